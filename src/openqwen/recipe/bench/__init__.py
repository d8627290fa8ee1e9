"""`openqwen bench`: claimed speeds measured on this machine, beside a peer where one is given (law
10).
"""
