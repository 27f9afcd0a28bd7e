-- Gives the trace compiler integer, floating-point, string, table and foreign-function work, and prints the results.
local bit = require("bit")
local ffi = require("ffi")

local function digest(values)
  local h = 5381
  for i = 1, #values do
    h = bit.tobit(bit.bxor(bit.lshift(h, 5) + h, values[i]))
  end
  return bit.tohex(h)
end

local function sieve(limit)
  local composite, count = {}, 0
  for i = 2, limit do
    if not composite[i] then
      count = count + 1
      for j = i * i, limit, i do composite[j] = true end
    end
  end
  return count
end

local function mandelbrot(size, depth)
  local inside = 0
  for y = 0, size - 1 do
    for x = 0, size - 1 do
      local cr, ci, zr, zi, n = 3 * x / size - 2, 2 * y / size - 1, 0, 0, 0
      while zr * zr + zi * zi < 4 and n < depth do
        zr, zi, n = zr * zr - zi * zi + cr, 2 * zr * zi + ci, n + 1
      end
      if n == depth then inside = inside + 1 end
    end
  end
  return inside
end

ffi.cdef [[
typedef struct { int32_t a; double b; uint8_t c[16]; } record;
int abs(int);
typedef int (*comparison)(const void *, const void *);
void qsort(void *, size_t, size_t, comparison);
]]

local function structures(n)
  local records = ffi.new("record[?]", n)
  local sum = 0
  for i = 0, n - 1 do
    records[i].a = ffi.C.abs(-i)
    records[i].b = i * 0.25
    records[i].c[i % 16] = i % 256
  end
  for i = 0, n - 1 do sum = sum + records[i].a + records[i].b + records[i].c[i % 16] end
  return sum
end

local function callbacks(n)
  local numbers = ffi.new("int32_t[?]", n)
  local state = 1
  for i = 0, n - 1 do
    state = (state * 16807) % 2147483647
    numbers[i] = state % 100000
  end
  local compare = ffi.cast("comparison", function(left, right)
    return ffi.cast("const int32_t *", left)[0] - ffi.cast("const int32_t *", right)[0]
  end)
  ffi.C.qsort(numbers, n, 4, compare)
  compare:free()
  for i = 1, n - 1 do assert(numbers[i - 1] <= numbers[i]) end
  return numbers[n / 2]
end

local function strings(n)
  local parts = {}
  for i = 1, n do parts[#parts + 1] = string.format("%d:%x:%.3f", i, i * 2654435761 % 4294967296, i / 7) end
  local text, values = table.concat(parts, ","), {}
  for number in text:gmatch("(%d+):") do values[#values + 1] = tonumber(number) % 65536 end
  return #text, digest(values)
end

print("sieve", sieve(200000))
print("mandelbrot", mandelbrot(150, 200))
print("structures", structures(50000))
print("callbacks", callbacks(2000))
print("strings", strings(20000))
for seed = 1, 20 do
  local values = {}
  for i = 1, 5000 do values[i] = bit.bxor(i * seed, bit.rol(i, seed)) end
  print("digest", seed, digest(values))
end
