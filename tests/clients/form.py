"""requests, whatever urllib3 it has: a form with a file whose name is not ASCII. Arguments: address, picture."""

import json
import sys

import requests
import urllib3

address, path = sys.argv[1:]
with open(path, "rb") as picture, requests.Session() as session:
    form = {"image": ("Päckchen €.jpg", picture, "image/jpeg")}
    answer = session.post(address, files=form, data={"metadata": json.dumps({"parcel": "Müller"})}, timeout=60)
print(urllib3.__version__, answer.status_code, answer.json().get("metadata"), answer.json().get("detail"))
