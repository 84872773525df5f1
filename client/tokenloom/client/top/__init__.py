"""`tokenloom top`: what replicas are busy with, live in a terminal.

Watch, a thread a replica      reads Admin.WatchLoad, again and again while it is away
  │ the last two reports
rows                           figures and rates, pure
  │ a row a replica, and one of all together
table, JSON                    on a terminal, in a pipe
"""
