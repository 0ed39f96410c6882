"""Pictures by location: from listed origins alone, at public addresses alone.

fetcher.py    a location -> the bytes behind it
location.py   the text -> its parts
allowed.py    listed? public?
resolver.py   a name -> its addresses
web.py        one GET, to addresses that were checked
objects.py    s3:// and gs://
"""
