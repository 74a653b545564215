"""Google Cloud Storage: the emulator gcp-storage-emulator, in memory: gcs_server.py DIR PORT. It
ends with its standard input, and removes DIR.

The emulator looks at no preconditions. The one that the endpoint relies on, ifGenerationMatch=0, is
added here as Google's JSON API has it: 412 where there is an object. The emulator answers one request after
the other, so that nothing comes in between.
"""

import os
import shutil
import sys
import threading
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def conditional(handler):
    def handle(request, response, storage, *args, **kwargs):
        # It stands in the URL of an upload's beginning, and of its parts.
        if request.query.get("ifGenerationMatch") == ["0"]:
            request.data  # The body is read before the answer.
            try:
                storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])
            except NotFound:
                pass
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet", "errors": []}})
                return None
        return handler(request, response, storage, *args, **kwargs)

    return handle


for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
        if handler in (objects.insert, objects.upload_partial):
            handlers[method] = conditional(handler)


make = objects._make_object_resource


def resource(base_url, bucket_name, object_name, content_type, *args, **kwargs):
    # What has no type is application/octet-stream there; the emulator would answer null.
    return make(base_url, bucket_name, object_name, content_type or "application/octet-stream", *args, **kwargs)


objects._make_object_resource = resource


# A connection that is opened and not used must not hold up the others.
server.server.HTTPServer = ThreadingHTTPServer
turn = threading.Lock()
route = server.Router.handle


def one_by_one(self, method):
    with turn:
        route(self, method)


server.Router.handle = one_by_one


def end():
    sys.stdin.read()
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    os._exit(0)


threading.Thread(target=end, daemon=True).start()
server.create_server("127.0.0.1", int(sys.argv[2]), in_memory=True).run()
