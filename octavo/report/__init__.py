"""Results for people: pictures, CSV, one HTML page, one Markdown page; every file appears whole or not at all."""
