"""One file per method; a file is a method by being here. `fedtailor.find.method(name)` finds it."""
