-- wrk -s wrk.lua URL -- CONTENT_TYPE BODY_FILE...
-- Posts the bodies in turn and ends with one line of JSON. Times are in microseconds.

local requests, last = {}, 0

function init(arguments)
   wrk.method = "POST"
   wrk.headers["Content-Type"] = arguments[1]
   for i = 2, #arguments do
      local file = assert(io.open(arguments[i], "rb"))
      requests[#requests + 1] = wrk.format(nil, nil, nil, file:read("*a"))
      file:close()
   end
end

function request()
   last = last % #requests + 1
   return requests[last]
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\n{"replies": %d, "microseconds": %d, "status_errors": %d, "connect": %d, "read": %d, "write": %d, '
         .. '"timeout": %d, "p50": %d, "p95": %d, "p99": %d, "max": %d}\n',
      summary.requests, summary.duration, errors.status, errors.connect, errors.read, errors.write,
      errors.timeout, latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
