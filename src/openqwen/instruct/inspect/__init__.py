"""`openqwen inspect`: a page to browse demonstrations, preferences, tasks and documents."""
