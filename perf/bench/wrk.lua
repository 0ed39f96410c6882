-- wrk's script: post the files named in BENCH_BODIES (separated by :) in turn, as BENCH_TYPE, and print the figures as
-- one line of JSON.
local requests, position = {}, 0

function init(args)
   local headers = { ["Content-Type"] = os.getenv("BENCH_TYPE") }
   for path in os.getenv("BENCH_BODIES"):gmatch("[^:]+") do
      local file = assert(io.open(path, "rb"))
      requests[#requests + 1] = wrk.format("POST", nil, headers, file:read("*a"))
      file:close()
   end
end

function request()
   position = position % #requests + 1
   return requests[position]
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.status + errors.connect + errors.read + errors.write + errors.timeout
   ))
end
