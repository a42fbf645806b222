"""The APIs: tables of fields and small readers on the way in, encoders of the same events on the way out.
Nothing here touches a connection: a sandbox reads large bodies with the same code."""
