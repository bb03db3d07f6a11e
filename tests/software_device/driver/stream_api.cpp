// The entry points of the CUDA runtime about streams, events, captures and graphs.
// https://docs.nvidia.com/cuda/cuda-runtime-api/ sections "Stream Management", "Event Management", "Graph Management".
#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>

#include <set>
#include <string>
#include <vector>

#include "failure.hpp"
#include "streams.hpp"

namespace {

using namespace soft;

std::set<Graph*> graphs;
std::set<GraphExec*> graph_execs;

template <class Object>
Object& find_in(const std::set<Object*>& objects, void* handle) {
  Object* const object = static_cast<Object*>(handle);
  if (!objects.count(object)) fail(cudaErrorInvalidResourceHandle, "no such graph, or one that is destroyed");
  return *object;
}

}  // namespace

// -- streams and events -----------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return runtime_call(__func__, [&] { *stream = reinterpret_cast<cudaStream_t>(make_stream(cudaStreamDefault, 0)); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return runtime_call(__func__, [&] { *stream = reinterpret_cast<cudaStream_t>(make_stream(flags, 0)); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return runtime_call(__func__, [&] { *stream = reinterpret_cast<cudaStream_t>(make_stream(flags, priority)); });
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  return runtime_call(__func__, [&] { *flags = find_stream(stream).flags; });
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return runtime_call(__func__, [&] { *priority = find_stream(stream).priority; });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return runtime_call(__func__, [&] { destroy_stream(stream); });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return runtime_call(__func__, [&] {
    Stream& stream = find_stream(handle);
    refuse_query(stream, "cudaStreamSynchronize");
    wait_for(dependencies(stream));
  });
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  bool done = false;
  const cudaError_t code = runtime_call(__func__, [&] {
    Stream& stream = find_stream(handle);
    refuse_query(stream, "cudaStreamQuery");
    done = poll(dependencies(stream));
  });
  return code == cudaSuccess && !done ? cudaErrorNotReady : code;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  return runtime_call(__func__, [&] {
    Stream& stream = find_stream(handle);
    Event& event = find_event(event_handle);
    if (stream.capture || event.capture) return capture_wait(stream, event);
    if (!event.record || event.record->done) return;
    if (is_legacy(stream)) refuse_legacy("cudaStreamWaitEvent");
    std::vector<OperationPtr> before = dependencies(stream);
    before.push_back(event.record);
    stream.last = append(stream.device, "cudaStreamWaitEvent", nullptr, false, before);
  });
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  return runtime_call(__func__, [&] {
    if (find_stream(stream).capture) {
      refuse_query(find_stream(stream), "cudaStreamAddCallback");
    }
    enqueue(find_stream(stream), "a host function", [=] {
      call_host([=] { callback(stream, cudaSuccess, data); });
      return std::string();
    });
  });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return runtime_call(__func__, [&] {
    enqueue(find_stream(stream), "a host function", [=] {
      call_host([=] { function(data); });
      return std::string();
    });
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return runtime_call(__func__, [&] { *event = reinterpret_cast<cudaEvent_t>(make_event(flags)); });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return runtime_call(__func__, [&] { *event = reinterpret_cast<cudaEvent_t>(make_event(cudaEventDefault)); });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return runtime_call(__func__, [&] { destroy_event(event); });
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  return runtime_call(__func__, [&] {
    Stream& stream = find_stream(handle);
    Event& event = find_event(event_handle);
    if (event.device != stream.device) fail(cudaErrorInvalidResourceHandle, "the event belongs to another device");
    if (stream.capture) return capture_record(stream, event);
    event.capture = nullptr;
    event.record = enqueue(stream, "cudaEventRecord", nullptr);
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  bool done = false;
  const cudaError_t code = runtime_call(__func__, [&] {
    Event& event = find_event(handle);
    refuse_query(event, "cudaEventQuery");
    refuse_unsafe("cudaEventQuery");
    done = !event.record || poll({event.record});
  });
  return code == cudaSuccess && !done ? cudaErrorNotReady : code;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return runtime_call(__func__, [&] {
    Event& event = find_event(handle);
    refuse_query(event, "cudaEventSynchronize");
    refuse_unsafe("cudaEventSynchronize");
    if (event.record) wait_for({event.record});
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  bool done = false;
  const cudaError_t code = runtime_call(__func__, [&] {
    const Event &start = find_event(start_handle), &end = find_event(end_handle);
    refuse_query(start, "cudaEventElapsedTime");
    refuse_query(end, "cudaEventElapsedTime");
    if (!start.record || !end.record || (start.flags | end.flags) & cudaEventDisableTiming) {
      fail(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime: an event that was not recorded, or has no timing");
    }
    done = start.record->done && end.record->done;
    *milliseconds = static_cast<float>(1e3 * (end.record->time - start.record->time));
  });
  return code == cudaSuccess && !done ? cudaErrorNotReady : code;
}

// -- captures and graphs ----------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return runtime_call(__func__, [&] { begin_capture(find_stream(stream), mode); });
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return runtime_call(__func__, [&] {
    *graph = nullptr;
    *graph = reinterpret_cast<cudaGraph_t>(*graphs.insert(end_capture(find_stream(stream))).first);
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return runtime_call(__func__, [&] { *status = capture_status(find_stream(stream)); });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return runtime_call(__func__, [&] {
    GraphExec* const made = new GraphExec{find_in(graphs, graph), nullptr};
    *exec = reinterpret_cast<cudaGraphExec_t>(*graph_execs.insert(made).first);
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return runtime_call(__func__, [&] { launch_graph(find_in(graph_execs, exec), find_stream(stream)); });
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
  return runtime_call(__func__, [&] { find_in(graph_execs, exec); });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return runtime_call(__func__, [&] {
    Graph& found = find_in(graphs, graph);
    graphs.erase(&found);
    delete &found;
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  return runtime_call(__func__, [&] {
    GraphExec& found = find_in(graph_execs, exec);
    graph_execs.erase(&found);
    delete &found;
  });
}

cudaError_t cudaProfilerStart() {
  return runtime_call(__func__, [] {});
}
cudaError_t cudaProfilerStop() {
  return runtime_call(__func__, [] {});
}
