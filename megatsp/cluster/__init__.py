"""What a cluster is to a job: its profile, and where the ranks of a mesh lie on its nodes."""
