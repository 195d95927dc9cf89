"""Open chest CTs by name: selection from the Imaging Data Commons' index, transfer, record of the sources."""
