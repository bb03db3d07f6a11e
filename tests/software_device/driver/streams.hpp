// Streams, events, captures and graphs: what is to be done, and what has to be done before it.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "failure.hpp"

namespace soft {

// Returns what is wrong, or nothing.
using Work = std::function<std::string()>;

struct Operation;
using OperationPtr = std::shared_ptr<Operation>;

// One thing in the queue of a stream.
struct Operation {
  std::string name;
  Work work;  // none: only a point that others wait for
  int device = 0;
  bool must_run = false;             // frees run even after a failure
  uint64_t number = 0;               // in the order of the calls
  double time = 0;                   // when it was done, in seconds
  std::vector<OperationPtr> before;  // not done when this was enqueued
  std::vector<Operation*> after;
  size_t missing = 0;  // operations before this that are not done
  bool done = false;
};

// A captured operation; `before` are earlier nodes.
struct Node {
  std::string name;
  Work work;
  std::vector<size_t> before;
};
struct Graph {
  std::vector<Node> nodes;
};

// An instantiated graph. Its launches follow one another, in whatever streams.
struct GraphExec {
  Graph graph;
  OperationPtr last;
};

struct Stream;

struct Capture {
  Graph graph;
  Stream* origin;
  std::set<Stream*> streams;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::string broken;  // what invalidated it
};

struct Stream {
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  OperationPtr last;  // of its queue
  std::shared_ptr<Capture> capture;
  std::vector<size_t> tail;  // nodes that the next captured operation comes after
  bool blocking() const { return !(flags & cudaStreamNonBlocking); }
};

struct Event {
  int device = this_thread().device;
  unsigned flags = 0;
  OperationPtr record;               // the last one; null: none, or a captured one
  std::shared_ptr<Capture> capture;  // in which it was recorded last
  std::vector<size_t> tail;
};

// Handles. The legacy and the per-thread stream of the current device have the handles 0 or 1, and 2.
Stream& find_stream(void* handle);
bool is_legacy(const Stream& stream);
Stream* make_stream(unsigned flags, int priority);
void destroy_stream(void* handle);
Event* make_event(unsigned flags);
Event& find_event(void* handle);
void destroy_event(void* handle);

// -- queue.cpp --------------------------------------------------------------------------------------------------------

// Puts work behind what is in the stream, or into the graph that it captures.
OperationPtr enqueue(Stream& stream, std::string name, Work work, bool must_run = false);

// The same, with the operations that come before it given, and no capture.
OperationPtr append(int device, std::string name, Work work, bool must_run, const std::vector<OperationPtr>& before);

// Before and after something is enqueued: throws what failed meanwhile; waits where the host would.
void report_kept_failure();
void settle(const OperationPtr& operation);

// What the next operation of the stream comes after.
std::vector<OperationPtr> dependencies(const Stream& stream);

// The host waits: runs queued work in a seeded legal order until these are done, and throws what failed.
void wait_for(const std::vector<OperationPtr>& targets);
void wait_for_device();
// For cudaFree and its like, whose errors CuPy drops: what fails is thrown by the next call that can report it.
void wait_quietly();
uint64_t synchronisations();
// Drops what is queued, as the reset of a device does. Returns how much that was.
size_t drop_everything();
// Runs everything, on all devices, for a test that looks for errors: without a count.
void flush();
// From inside of Work: calls a host function without the driver's lock.
void call_host(const std::function<void()>& function);

// Whether they are done; a seeded coin may bring it about.
bool poll(const std::vector<OperationPtr>& targets);

// -- capture.cpp ------------------------------------------------------------------------------------------------------

void begin_capture(Stream& stream, cudaStreamCaptureMode mode);
Graph* end_capture(Stream& stream);
cudaStreamCaptureStatus capture_status(const Stream& stream);
void check_whole(const Capture& capture);  // throws if it has been invalidated
void capture_node(Stream& stream, std::string name, Work work);
void capture_record(Stream& stream, Event& event);
void capture_wait(Stream& stream, Event& event);
void leave_capture(Stream& stream);  // the stream is destroyed
void end_all_captures();
void launch_graph(GraphExec& graph, Stream& stream);

// What a capture forbids: the call fails, and the capture with it, as on the hardware.
void refuse_unsafe(const char* what);           // cudaMalloc and its like, unless the mode allows it
void refuse_synchronisation(const char* what);  // of the device
void refuse_legacy(const char* what);           // the legacy stream while a blocking stream captures
void refuse_query(const Stream& stream, const char* what);
void refuse_query(const Event& event, const char* what);

}  // namespace soft
