"""Documents that stay where they are: read, cut, indexed and searched, each silo its own."""
