"""The recipe: YAML document, schema, the libraries' options, checks, fingerprints."""
