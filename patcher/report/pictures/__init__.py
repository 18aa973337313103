"""Pictures of a sweep. Importing this needs no matplotlib; drawing does (the extra ``plots``)."""
