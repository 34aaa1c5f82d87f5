"""Jobs that outlive the processes that run them: what is known of each in a database, its media in a folder."""
