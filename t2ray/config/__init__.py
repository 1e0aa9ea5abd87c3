"""What a user configures: training jobs, endpoints and searches, read from YAML and checked. No torch, no ray."""
