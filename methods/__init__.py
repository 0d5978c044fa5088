"""The papers' methods: torch only, one file per idea."""
