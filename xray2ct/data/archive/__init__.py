"""Open chest CTs by name: selection from the Imaging Data Commons' index, transfer, and the record of where they came from."""
