"""What training minimises: DomainBed's objectives, each a function of the global batch."""
