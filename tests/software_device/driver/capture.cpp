// Captures of streams into graphs, what they forbid, and the launch of a graph.
// CUDA C++ Programming Guide, "Creating a Graph Using Stream Capture" and "Prohibited and Unhandled Operations".
#include "streams.hpp"

#include <algorithm>
#include <utility>

namespace soft {
namespace {

std::vector<std::shared_ptr<Capture>> captures;  // those that go on

[[noreturn]] void refuse(const std::shared_ptr<Capture>& capture, cudaError_t code, std::string words) {
  if (capture->broken.empty()) capture->broken = words;
  fail(code, std::move(words));
}

// Ends those captures that `forbids` names, and the call with them.
template <class Forbids>
void refuse_where(Forbids forbids, cudaError_t code, const std::string& words) {
  bool refused = false;
  for (auto& capture : captures) {
    if (!forbids(*capture)) continue;
    if (capture->broken.empty()) capture->broken = words;
    refused = true;
  }
  if (refused) fail(code, words);
}

void join(Stream& stream, const std::shared_ptr<Capture>& capture, const std::vector<size_t>& tail) {
  stream.capture = capture;
  capture->streams.insert(&stream);
  for (size_t node : tail) {
    if (std::find(stream.tail.begin(), stream.tail.end(), node) == stream.tail.end()) stream.tail.push_back(node);
  }
}

void end(const std::shared_ptr<Capture>& capture) {
  for (Stream* stream : capture->streams) {
    stream->capture = nullptr;
    stream->tail.clear();
  }
  captures.erase(std::find(captures.begin(), captures.end(), capture));
}

// Whether every node comes before the end of the stream that the capture began in.
bool joined(const Capture& capture) {
  std::vector<bool> reached(capture.graph.nodes.size());
  for (size_t node : capture.origin->tail) reached[node] = true;
  for (size_t node = reached.size(); node-- > 0;) {
    if (!reached[node]) return false;  // its successors, which come later, have been here
    for (size_t before : capture.graph.nodes[node].before) reached[before] = true;
  }
  return true;
}

}  // namespace

void check_whole(const Capture& capture) {
  if (!capture.broken.empty()) {
    fail(cudaErrorStreamCaptureInvalidated, "the capture is no longer valid: " + capture.broken);
  }
}

void begin_capture(Stream& stream, cudaStreamCaptureMode mode) {
  if (is_legacy(stream)) fail(cudaErrorStreamCaptureUnsupported, "the legacy stream cannot be captured");
  if (stream.capture) fail(cudaErrorIllegalState, "the stream is being captured already");
  auto capture = std::make_shared<Capture>();
  capture->origin = &stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  captures.push_back(capture);
  join(stream, capture, {});
}

Graph* end_capture(Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  if (!capture) fail(cudaErrorIllegalState, "the stream is not being captured");
  if (capture->origin != &stream) {
    refuse(capture, cudaErrorStreamCaptureUnmatched, "the capture must end in the stream that it began in");
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id()) {
    refuse(capture, cudaErrorStreamCaptureWrongThread, "the capture must end in the thread that it began in");
  }
  const bool whole = joined(*capture);
  end(capture);
  check_whole(*capture);
  if (!whole) {
    fail(cudaErrorStreamCaptureUnjoined,
         "a stream that joined the capture has work that its first stream does not wait for");
  }
  return new Graph(std::move(capture->graph));
}

cudaStreamCaptureStatus capture_status(const Stream& stream) {
  if (is_legacy(stream)) {
    for (auto& capture : captures) {
      for (const Stream* other : capture->streams) {
        if (other->blocking())
          fail(cudaErrorStreamCaptureImplicit, "the legacy stream, while a blocking stream captures");
      }
    }
  }
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->broken.empty() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
}

void capture_node(Stream& stream, std::string name, Work work) {
  check_whole(*stream.capture);
  std::vector<Node>& nodes = stream.capture->graph.nodes;
  nodes.push_back({std::move(name), std::move(work), stream.tail});
  stream.tail = {nodes.size() - 1};
}

void capture_record(Stream& stream, Event& event) {
  check_whole(*stream.capture);
  event.record = nullptr;
  event.capture = stream.capture;
  event.tail = stream.tail;
}

void capture_wait(Stream& stream, Event& event) {
  const bool over = event.capture && std::find(captures.begin(), captures.end(), event.capture) == captures.end();
  if (over) {
    const char* const words = "cudaStreamWaitEvent for an event that was recorded in a capture that is over";
    if (stream.capture) refuse(stream.capture, cudaErrorCapturedEvent, words);
    fail(cudaErrorCapturedEvent, words);
  }
  if (stream.capture) {
    check_whole(*stream.capture);
    if (!event.capture) {
      if (!event.record) return;  // never recorded: nothing to wait for
      refuse(stream.capture, cudaErrorStreamCaptureIsolation,
             "a captured stream must not wait for an event that was recorded outside the capture");
    }
    if (event.capture != stream.capture) {
      if (event.capture->broken.empty()) event.capture->broken = "a stream of another capture waits for its event";
      refuse(stream.capture, cudaErrorStreamCaptureMerge, "the stream and the event belong to two captures");
    }
  } else if (is_legacy(stream)) {
    refuse(event.capture, cudaErrorStreamCaptureImplicit, "the legacy stream cannot join a capture");
  }
  join(stream, event.capture, event.tail);
}

void leave_capture(Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  if (!capture) return;
  if (capture->origin == &stream) return end(capture);
  capture->broken = "a stream was destroyed during the capture";
  capture->streams.erase(&stream);
}

void end_all_captures() {
  while (!captures.empty()) end(std::shared_ptr<Capture>(captures.back()));
}

void launch_graph(GraphExec& exec, Stream& stream) {
  report_kept_failure();
  if (stream.capture) {  // its nodes become nodes of the graph that is captured
    check_whole(*stream.capture);
    std::vector<Node>& nodes = stream.capture->graph.nodes;
    const size_t first = nodes.size();
    for (Node node : exec.graph.nodes) {
      for (size_t& before : node.before) before += first;
      if (node.before.empty()) node.before = stream.tail;
      nodes.push_back(std::move(node));
    }
    std::vector<size_t> all(exec.graph.nodes.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = first + i;
    if (!all.empty()) stream.tail = all;
    return;
  }
  if (is_legacy(stream)) refuse_legacy("the launch of a graph");
  std::vector<OperationPtr> outside = dependencies(stream);
  if (exec.last) outside.push_back(exec.last);
  std::vector<OperationPtr> inside;
  for (const Node& node : exec.graph.nodes) {
    std::vector<OperationPtr> before;
    for (size_t other : node.before) before.push_back(inside[other]);
    inside.push_back(append(stream.device, node.name, node.work, false, node.before.empty() ? outside : before));
  }
  inside.insert(inside.end(), outside.begin(), outside.end());
  stream.last = exec.last = append(stream.device, "the end of a graph", nullptr, false, inside);
  settle(exec.last);
}

void refuse_unsafe(const char* what) {
  const auto here = std::this_thread::get_id();
  refuse_where(
      [&](const Capture& capture) {
        return capture.mode == cudaStreamCaptureModeGlobal ||
               (capture.mode == cudaStreamCaptureModeThreadLocal && capture.thread == here);
      },
      cudaErrorStreamCaptureUnsupported, std::string(what) + " is not allowed while a stream is captured in this mode");
}

void refuse_synchronisation(const char* what) {
  refuse_where([](const Capture&) { return true; }, cudaErrorStreamCaptureUnsupported,
               std::string(what) + " is not allowed while a stream is captured");
}

void refuse_legacy(const char* what) {
  refuse_where(
      [](const Capture& capture) {
        return std::any_of(capture.streams.begin(), capture.streams.end(),
                           [](const Stream* stream) { return stream->blocking(); });
      },
      cudaErrorStreamCaptureImplicit,
      std::string(what) + " in the legacy stream would depend on a blocking stream that is being captured");
}

void refuse_query(const Stream& stream, const char* what) {
  if (is_legacy(stream)) refuse_legacy(what);
  if (stream.capture) {
    refuse(stream.capture, cudaErrorStreamCaptureUnsupported,
           std::string(what) + " of a stream that is being captured");
  }
}

void refuse_query(const Event& event, const char* what) {
  if (event.capture) {
    refuse(event.capture, cudaErrorCapturedEvent, std::string(what) + " of an event that was recorded in a capture");
  }
}

}  // namespace soft
