-- wrk's script: post the files named in BENCH_PICTURES (separated by :) in turn, as raw bodies or as JSON, and print
-- the figures as one line of JSON.
local requests, position = {}, 0
local base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function encode(data)
   local out = {}
   for i = 1, #data, 3 do
      local a, b, c = data:byte(i, i + 2)
      local n = a * 65536 + (b or 0) * 256 + (c or 0)
      for j = 1, 4 do
         local k = math.floor(n / 64 ^ (4 - j)) % 64
         out[#out + 1] = base64:sub(k + 1, k + 1)
      end
      if not b then out[#out - 1] = "=" end
      if not c then out[#out] = "=" end
   end
   return table.concat(out)
end

function init(args)
   local json = os.getenv("BENCH_FORM") == "json"
   for path in os.getenv("BENCH_PICTURES"):gmatch("[^:]+") do
      local file = assert(io.open(path, "rb"))
      local body = file:read("*a")
      file:close()
      if json then body = '{"image": "' .. encode(body) .. '"}' end
      local headers = { ["Content-Type"] = json and "application/json" or "image/jpeg" }
      requests[#requests + 1] = wrk.format("POST", nil, headers, body)
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
