"""Tests in processes of their own: other programs, kills, several processes, other libraries."""
