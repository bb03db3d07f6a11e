// The handles of streams and events. CUDA C++ Programming Guide, "Streams" and "Default Stream".
#include "streams.hpp"

#include <cstdint>
#include <map>

#include "settings.hpp"

namespace soft {
namespace {

// Kept for ever: a thread may end, and the process too, with work in its queue.
std::map<int, Stream*> legacy_streams;  // by device
std::map<std::pair<std::thread::id, int>, Stream*> thread_streams;
std::set<Stream*> streams;
std::set<Event*> events;
std::vector<std::pair<int, OperationPtr>> orphans;  // last operations of blocking streams that are destroyed

Stream* fresh_stream(int device, unsigned flags, int priority) {
  Stream* stream = new Stream;
  stream->device = device;
  stream->flags = flags;
  stream->priority = priority;
  return stream;
}

template <class Key>
Stream& default_stream(std::map<Key, Stream*>& of, const Key& key) {
  Stream*& stream = of[key];
  if (!stream) stream = fresh_stream(this_thread().device, cudaStreamDefault, 0);
  return *stream;
}

}  // namespace

Stream& find_stream(void* handle) {
  ThreadState& thread = this_thread();
  thread.has_context = true;
  switch (reinterpret_cast<uintptr_t>(handle)) {
    case 0:
    case 1:
      return default_stream(legacy_streams, thread.device);
    case 2:
      return default_stream(thread_streams, {std::this_thread::get_id(), thread.device});
    default: {
      Stream* const stream = static_cast<Stream*>(handle);
      if (!streams.count(stream)) fail(cudaErrorInvalidResourceHandle, "no such stream, or one that is destroyed");
      return *stream;
    }
  }
}

bool is_legacy(const Stream& stream) {
  auto found = legacy_streams.find(stream.device);
  return found != legacy_streams.end() && found->second == &stream;
}

Stream* make_stream(unsigned flags, int priority) {
  this_thread().has_context = true;
  return *streams.insert(fresh_stream(this_thread().device, flags, priority)).first;
}

// What is in the queue is still done.
void destroy_stream(void* handle) {
  Stream& stream = find_stream(handle);
  if (!streams.count(&stream)) fail(cudaErrorInvalidResourceHandle, "a default stream cannot be destroyed");
  leave_capture(stream);
  if (stream.blocking() && stream.last) orphans.emplace_back(stream.device, stream.last);
  streams.erase(&stream);
  delete &stream;
}

Event* make_event(unsigned flags) {
  this_thread().has_context = true;
  Event* event = new Event;
  event->flags = flags;
  return *events.insert(event).first;
}

Event& find_event(void* handle) {
  Event* const event = static_cast<Event*>(handle);
  if (!events.count(event)) fail(cudaErrorInvalidResourceHandle, "no such event, or one that is destroyed");
  return *event;
}

void destroy_event(void* handle) {
  Event& event = find_event(handle);
  events.erase(&event);
  delete &event;
}

// A stream is a queue. The legacy stream comes after all that is in the blocking streams of its device, and what comes
// into a blocking stream comes after all that is in the legacy stream; a per-thread stream is blocking.
std::vector<OperationPtr> dependencies(const Stream& stream) {
  std::vector<OperationPtr> before;
  auto add = [&before](const OperationPtr& operation) {
    if (operation && !operation->done) before.push_back(operation);
  };
  add(stream.last);
  if (is_legacy(stream)) {
    auto add_stream = [&](const Stream* other) {
      if (other->blocking() && other->device == stream.device && other != &stream) add(other->last);
    };
    for (const Stream* other : streams) add_stream(other);
    for (const auto& [key, other] : thread_streams) add_stream(other);
    size_t kept = 0;
    for (auto& orphan : orphans) {
      if (orphan.second->done) continue;
      if (orphan.first == stream.device) add(orphan.second);
      orphans[kept++] = orphan;
    }
    orphans.resize(kept);
  } else if (stream.blocking()) {
    auto legacy = legacy_streams.find(stream.device);
    if (legacy != legacy_streams.end()) add(legacy->second->last);
  }
  return before;
}

}  // namespace soft
