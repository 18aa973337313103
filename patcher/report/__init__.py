"""What a person looks at: pictures, and the page of a sweep; and how templates are read."""
