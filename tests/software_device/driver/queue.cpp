// The queue of all streams. Nothing runs when it is enqueued. When the host waits, queued operations run one by one in
// a random order that the streams allow: either all that is there until the awaited ones are done, or only what those
// depend on. So a wait that is missing shows as a wrong result with some seed, as it does on hardware with some timing.
#include "streams.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <map>
#include <optional>
#include <unordered_set>
#include <utility>

#include "settings.hpp"

namespace soft {
namespace {

constexpr size_t kDepth = 1024;  // operations in flight: a launch blocks when there are more, as on the hardware

struct Queue {
  std::map<uint64_t, OperationPtr> pending;  // by number
  std::vector<OperationPtr> ready;           // those of them that wait for nothing
  uint64_t next_number = 0;
  uint64_t synchronisations = 0;
  bool running = false;  // a thread runs operations; only a host function lets another see this
  std::condition_variable_any stopped;
  std::optional<Failure> kept;  // of work that ran where no error could be returned
};

Queue& queue() {
  static Queue* const instance = new Queue;  // outlives every other object of the process
  return *instance;
}

// One thread runs the queue at a time.
class Running {
 public:
  Running() {
    while (queue().running) queue().stopped.wait(this_thread().lock);
    queue().running = true;
  }
  ~Running() {
    queue().running = false;
    queue().stopped.notify_all();
  }
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void complete(Operation& operation) {
  operation.done = true;
  operation.time = now();
  operation.work = nullptr;
  operation.before.clear();
  for (Operation* next : operation.after) {
    if (--next->missing == 0) queue().ready.push_back(queue().pending.at(next->number));
  }
  operation.after.clear();
  queue().pending.erase(operation.number);
}

std::string result_of(const Operation& operation) {
  try {
    return operation.work ? operation.work() : std::string();
  } catch (const std::exception& error) {
    return operation.name + ": " + error.what();
  }
}

void run(size_t index) {
  std::vector<OperationPtr>& ready = queue().ready;
  const OperationPtr operation = ready[index];
  ready[index] = ready.back();
  ready.pop_back();
  const std::string wrong = result_of(*operation);
  if (wrong.empty()) return complete(*operation);
  queue().pending.erase(operation->number);
  operation->done = true;
  const size_t dropped = drop_everything();
  std::string words = wrong;
  if (dropped > 0) words += "\n(the device was reset: " + std::to_string(dropped) + " operations queued were dropped)";
  fail(cudaErrorLaunchFailure, words);
}

bool all_done(const std::vector<OperationPtr>& targets) {
  return std::all_of(targets.begin(), targets.end(), [](const OperationPtr& target) { return target->done; });
}

// The targets and all that comes before them.
std::unordered_set<const Operation*> closure(const std::vector<OperationPtr>& targets) {
  std::unordered_set<const Operation*> found;
  std::vector<OperationPtr> open = targets;
  while (!open.empty()) {
    const OperationPtr operation = open.back();
    open.pop_back();
    if (operation->done || !found.insert(operation.get()).second) continue;
    open.insert(open.end(), operation->before.begin(), operation->before.end());
  }
  return found;
}

void run_until_done(const std::vector<OperationPtr>& targets) {
  std::vector<OperationPtr>& ready = queue().ready;
  if (random_below(2)) {
    while (!all_done(targets)) run(random_below(ready.size()));
    return;
  }
  const std::unordered_set<const Operation*> needed = closure(targets);
  std::vector<size_t> candidates;
  while (!all_done(targets)) {
    candidates.clear();
    for (size_t i = 0; i < ready.size(); ++i) {
      if (needed.count(ready[i].get())) candidates.push_back(i);
    }
    run(candidates[random_below(candidates.size())]);
  }
}

std::vector<OperationPtr> all_of_device() {
  std::vector<OperationPtr> found;
  for (auto& [number, operation] : queue().pending) {
    if (operation->device == this_thread().device) found.push_back(operation);
  }
  return found;
}

}  // namespace

size_t drop_everything() {
  std::map<uint64_t, OperationPtr> dropped;
  dropped.swap(queue().pending);
  queue().ready.clear();
  for (auto& [number, operation] : dropped) {
    if (operation->must_run) result_of(*operation);
    operation->done = true;
    operation->time = now();
    operation->work = nullptr;
    operation->before.clear();
    operation->after.clear();
  }
  return dropped.size();
}

void report_kept_failure() {
  if (!queue().kept) return;
  const Failure failure = *queue().kept;
  queue().kept.reset();
  throw failure;
}

void settle(const OperationPtr& operation) {
  if (queue().running) return;
  if (launches_block()) {
    Running here;
    run_until_done({operation});
  } else if (queue().pending.size() > kDepth) {
    Running here;
    while (queue().pending.size() > kDepth / 2) run(random_below(queue().ready.size()));
  }
}

OperationPtr append(int device, std::string name, Work work, bool must_run, const std::vector<OperationPtr>& before) {
  auto operation = std::make_shared<Operation>();
  operation->name = std::move(name);
  operation->work = std::move(work);
  operation->device = device;
  operation->must_run = must_run;
  operation->number = queue().next_number++;
  for (const OperationPtr& other : before) {
    if (other->done) continue;
    operation->before.push_back(other);
    other->after.push_back(operation.get());
  }
  operation->missing = operation->before.size();
  queue().pending[operation->number] = operation;
  if (operation->missing == 0) queue().ready.push_back(operation);
  return operation;
}

OperationPtr enqueue(Stream& stream, std::string name, Work work, bool must_run) {
  report_kept_failure();
  if (is_legacy(stream)) refuse_legacy(name.c_str());
  if (stream.capture) {
    capture_node(stream, std::move(name), std::move(work));
    return nullptr;
  }
  stream.last = append(stream.device, std::move(name), std::move(work), must_run, dependencies(stream));
  const OperationPtr operation = stream.last;
  settle(operation);
  return operation;
}

void wait_for(const std::vector<OperationPtr>& targets) {
  ++queue().synchronisations;
  report_kept_failure();
  Running here;
  run_until_done(targets);
}

void wait_for_device() { wait_for(all_of_device()); }

void wait_quietly() {
  ++queue().synchronisations;
  Running here;
  try {
    run_until_done(all_of_device());
  } catch (const Failure& failure) {
    if (!queue().kept) queue().kept = failure;
  }
}

uint64_t synchronisations() { return queue().synchronisations; }

void flush() {
  {
    Running here;
    while (!queue().ready.empty()) run(random_below(queue().ready.size()));
  }
  report_kept_failure();
}

// It may want Python's lock, which another thread may hold while that one waits for the driver's.
void call_host(const std::function<void()>& function) {
  ThreadState& thread = this_thread();
  thread.in_callback = true;
  thread.lock.unlock();
  function();
  thread.lock.lock();
  thread.in_callback = false;
}

bool poll(const std::vector<OperationPtr>& targets) {
  if (all_done(targets)) return true;
  if (queue().running || random_below(2)) return false;
  Running here;
  try {
    run_until_done(targets);
  } catch (const Failure& failure) {
    if (!queue().kept) queue().kept = failure;
  }
  return true;
}

}  // namespace soft
