"""The statements of the store, in named blocks; see `meshkit.postgres.load_sql`."""
