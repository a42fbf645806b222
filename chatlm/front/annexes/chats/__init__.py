"""Chats that are kept on the server, for all devices of their owner.

`records` says what a record is and what a change makes of it. `changes`, `listing`, `pictures` and `search`
do this in the store, with the tables of `tables`. `reading` checks bodies, `routes` has the handlers."""
