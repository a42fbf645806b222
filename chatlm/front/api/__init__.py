"""The APIs: a dialect for each, and what dialects share: tables of fields and readers on the way in, encoders
of the same events on the way out. Nothing here touches a connection: a sandbox reads bodies with it too."""
