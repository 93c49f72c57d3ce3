//! An in-memory runtime and API server, for this crate's unit tests only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use weft_agent_runtime::{
    Container, ContainerSpec, ContainerState, Error, Exit, Image, Runtime, RuntimeEvent, Sandbox,
    SandboxSpec, Stdio,
};

use crate::clock;
use crate::config::{Config, ServerTls};
use crate::shared::Shared;

#[derive(Default)]
struct Kept {
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Container>,
    calls: Vec<String>,
}

/// A runtime whose containers run until they are told to end.
pub(crate) struct FakeRuntime {
    kept: Mutex<Kept>,
    events: broadcast::Sender<RuntimeEvent>,
    pub(crate) logs: PathBuf,
}

fn now_ns() -> i64 {
    i64::try_from(clock::now().as_nanosecond()).unwrap()
}

impl FakeRuntime {
    pub(crate) fn new(logs: PathBuf) -> Arc<Self> {
        Arc::new(Self { kept: Mutex::default(), events: broadcast::Sender::new(64), logs })
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.kept.lock().calls.clone()
    }

    pub(crate) fn containers(&self) -> Vec<Container> {
        self.kept.lock().containers.values().cloned().collect()
    }

    pub(crate) fn sandboxes(&self) -> Vec<Sandbox> {
        self.kept.lock().sandboxes.values().cloned().collect()
    }

    /// Ends a container.
    pub(crate) fn exit(&self, id: &str, code: i32) -> RuntimeEvent {
        let mut kept = self.kept.lock();
        let container = kept.containers.get_mut(id).unwrap();
        let started_at_ns = match container.state {
            ContainerState::Running { started_at_ns } => started_at_ns,
            ContainerState::Created | ContainerState::Exited(_) => 0,
        };
        container.state =
            ContainerState::Exited(Exit { code, started_at_ns, finished_at_ns: now_ns(), ..Exit::default() });
        let sandbox = container.sandbox_id.clone();
        let event = RuntimeEvent::ContainerExited {
            pod_uid: kept.sandboxes[&sandbox].spec.uid.clone(),
            container_id: id.to_owned(),
        };
        let _ = self.events.send(event.clone());
        event
    }
}

#[async_trait::async_trait]
impl Runtime for FakeRuntime {
    async fn run_sandbox(&self, spec: SandboxSpec) -> Result<Sandbox, Error> {
        let mut kept = self.kept.lock();
        let id = format!("sandbox-{}-{}", spec.name, spec.attempt);
        kept.calls.push(format!("run {id}"));
        let sandbox = Sandbox {
            id: id.clone(),
            spec,
            ready: true,
            ips: vec!["10.42.0.9".parse().unwrap()],
            created_at_ns: now_ns(),
        };
        kept.sandboxes.insert(id, sandbox.clone());
        Ok(sandbox)
    }

    async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let mut kept = self.kept.lock();
        kept.calls.push(format!("stop {id}"));
        if let Some(sandbox) = kept.sandboxes.get_mut(id) {
            sandbox.ready = false;
        }
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), Error> {
        let mut kept = self.kept.lock();
        kept.calls.push(format!("remove {id}"));
        kept.sandboxes.remove(id);
        kept.containers.retain(|_, c| c.sandbox_id != id);
        Ok(())
    }

    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, Error> {
        Ok(self.sandboxes())
    }

    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<String, Error> {
        let mut kept = self.kept.lock();
        let id = format!("{}-{}", spec.name, spec.attempt);
        kept.calls.push(format!("create {id}"));
        let container = Container {
            id: id.clone(),
            sandbox_id: sandbox_id.to_owned(),
            spec,
            image_id: "sha256:1".into(),
            state: ContainerState::Created,
            created_at_ns: now_ns(),
        };
        kept.containers.insert(id.clone(), container);
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<(), Error> {
        let mut kept = self.kept.lock();
        kept.calls.push(format!("start {id}"));
        kept.containers.get_mut(id).unwrap().state = ContainerState::Running { started_at_ns: now_ns() };
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Error> {
        self.kept.lock().calls.push(format!("stop {id} {}s", grace.as_secs()));
        self.exit(id, 143);
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<(), Error> {
        self.kept.lock().containers.remove(id);
        Ok(())
    }

    async fn list_containers(&self) -> Result<Vec<Container>, Error> {
        Ok(self.containers())
    }

    async fn container(&self, id: &str) -> Result<Container, Error> {
        let found = self.kept.lock().containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
    }

    async fn exec(&self, _id: &str, command: Vec<String>, stdio: Stdio) -> Result<i32, Error> {
        use std::io::Write;
        if let Some(out) = stdio.stdout {
            std::fs::File::from(out).write_all(command.join(" ").as_bytes()).unwrap();
        }
        Ok(if command.first().is_some_and(|c| c == "false") { 1 } else { 0 })
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>, Error> {
        let image =
            Image { id: "sha256:1".into(), tags: vec![reference.into()], size_bytes: 1, user: String::new() };
        Ok((reference != "missing").then_some(image))
    }

    async fn list_images(&self) -> Result<Vec<Image>, Error> {
        Ok(Vec::new())
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.events.subscribe()
    }

    async fn log_path(&self, id: &str) -> Result<PathBuf, Error> {
        Ok(self.logs.join(format!("{id}.log")))
    }

    async fn sandbox_pid(&self, _id: &str) -> Result<i32, Error> {
        Ok(1)
    }
}

/// Answers what the kubelet asks, and remembers what it wrote.
#[derive(Default)]
pub(crate) struct FakeApi {
    /// Method, path, body.
    pub(crate) written: Mutex<Vec<(Method, String, Value)>>,
    /// ConfigMaps by name.
    pub(crate) config_maps: Mutex<BTreeMap<String, Value>>,
}

impl FakeApi {
    pub(crate) fn client(self: &Arc<Self>) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let api = api.clone();
            async move { Ok::<_, std::convert::Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let path = head.uri.path().to_owned();
        if head.method == Method::GET {
            if query.contains("watch=") {
                return Response::new(Body::from_stream(futures::stream::pending::<
                    Result<bytes::Bytes, std::io::Error>,
                >()));
            }
            let wanted = query.rsplit("metadata.name%3D").next().unwrap_or_default();
            let wanted = wanted.split('&').next().unwrap_or_default();
            let items: Vec<Value> = match path.rsplit('/').next() {
                Some("configmaps") => self.config_maps.lock().get(wanted).cloned().into_iter().collect(),
                _ => Vec::new(),
            };
            return reply(&json!({"metadata": {"resourceVersion": "1"}, "items": items}));
        }
        let bytes = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        self.written.lock().push((head.method, path, body));
        reply(&json!({"metadata": {"name": "x"}, "involvedObject": {}}))
    }

    /// The newest status of a pod, all patches merged.
    pub(crate) fn status(&self) -> Value {
        let mut status = json!({});
        for (_, path, body) in self.written.lock().iter() {
            if path.ends_with("/status") {
                for (key, value) in body["status"].as_object().unwrap() {
                    if key != "conditions" {
                        status[key] = value.clone();
                    }
                }
            }
        }
        status
    }

    pub(crate) fn events(&self) -> Vec<String> {
        let written = self.written.lock();
        let events =
            written.iter().filter(|(method, path, _)| *method == Method::POST && path.ends_with("/events"));
        events.map(|(_, _, body)| body["reason"].as_str().unwrap().to_owned()).collect()
    }
}

fn reply(value: &Value) -> Response<Body> {
    Response::new(Body::from(value.to_string()))
}

/// What the parts share, around the fakes, in a folder of its own.
pub(crate) fn shared(dir: &std::path::Path, runtime: Arc<FakeRuntime>, api: &Arc<FakeApi>) -> Arc<Shared> {
    let tls = ServerTls { cert_pem: String::new(), key_pem: String::new(), client_ca_pem: String::new() };
    let (_, ready) = tokio::sync::watch::channel(true);
    let config = Config::new("node", "10.0.0.1".parse().unwrap(), dir, tls, ready);
    let (shared, queue) = Shared::new(config, api.client(), runtime);
    let stop = tokio_util::sync::CancellationToken::new();
    tokio::spawn(crate::services::run(shared.clone(), stop.clone()));
    tokio::spawn(crate::events::run(queue, shared.client.clone(), stop));
    shared
}

/// Waits until `check` holds, at most ten seconds.
pub(crate) async fn until(what: &str, check: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(tokio::time::Instant::now() < deadline, "did not happen: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
