"""The papers' claims in miniature: small models, films of digits, several seeds. docs/claims.md holds what came out."""
