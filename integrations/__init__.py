"""kdops in other people's trainers. Imported as ``kdops.integrations``."""
