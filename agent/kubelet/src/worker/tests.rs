//! A worker over an in-memory runtime and API server: a pod's life from its first sight to its last trace.

use super::*;
use crate::fake::{FakeApi, FakeRuntime, shared, until};
use serde_json::{Value, json};
use weft_agent_runtime::RuntimeEvent;

struct Scene {
    dir: tempfile::TempDir,
    runtime: Arc<FakeRuntime>,
    api: Arc<FakeApi>,
    shared: Arc<Shared>,
    update: watch::Sender<Update>,
    inbox: Inbox,
    worker: tokio::task::JoinHandle<PodId>,
}

fn pod(spec: Value) -> Arc<Pod> {
    let object = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec});
    Arc::new(serde_json::from_value(object).unwrap())
}

fn begin(pod: &Arc<Pod>, adopted: impl FnOnce(&FakeRuntime) -> Adopted) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let runtime = FakeRuntime::new(dir.path().join("logs"));
    let api = Arc::new(FakeApi::default());
    let shared = shared(dir.path(), runtime.clone(), &api);
    let update = watch::Sender::new(Update { pod: pod.clone(), removed: false, rejected: None });
    let (inbox, messages) = Inbox::new();
    let adopted = adopted(&runtime);
    let worker = tokio::spawn(run(shared.clone(), update.subscribe(), (inbox.clone(), messages), adopted));
    Scene { dir, runtime, api, shared, update, inbox, worker }
}

impl Scene {
    fn tell(&self, event: RuntimeEvent) {
        if let RuntimeEvent::ContainerExited { container_id, .. } = event {
            self.inbox.offer(Message::Exited(container_id));
        }
    }

    fn container(&self) -> Value {
        self.api.status()["containerStatuses"][0].clone()
    }

    async fn running(&self, restarts: i64) {
        until("the container runs", || {
            let c = self.container();
            c["state"]["running"].is_object() && c["restartCount"] == restarts
        })
        .await;
    }

    fn change(&self, change: impl FnOnce(&mut Pod)) {
        self.update.send_modify(|update| {
            let mut pod = (*update.pod).clone();
            change(&mut pod);
            update.pod = Arc::new(pod);
        });
    }
}

fn delete(pod: &mut Pod) {
    pod.metadata.deletion_timestamp = Some(clock::seconds(clock::now()));
    pod.metadata.deletion_grace_period_seconds = Some(5);
}

#[tokio::test]
async fn from_first_sight_to_last_trace() {
    let scene = begin(&pod(json!({"containers": [{"name": "a", "image": "i"}]})), |_| Adopted::default());
    scene.running(0).await;
    let status = scene.api.status();
    assert_eq!((status["phase"].as_str(), status["podIP"].as_str()), (Some("Running"), Some("10.42.0.9")));
    assert_eq!(scene.container()["containerID"], "weft://a-0");
    let events = || scene.api.events();
    until("its events", || events() == ["Pulled", "Created", "Started"]).await;

    // The first crash restarts at once, the second waits.
    scene.tell(scene.runtime.exit("a-0", 1));
    scene.running(1).await;
    assert_eq!(scene.container()["lastState"]["terminated"]["exitCode"], 1);
    scene.tell(scene.runtime.exit("a-1", 2));
    until("crash loop", || scene.container()["state"]["waiting"]["reason"] == "CrashLoopBackOff").await;
    assert_eq!(
        scene.container()["state"]["waiting"]["message"],
        "back-off 10s restarting failed container=a pod=p_n(u)"
    );

    scene.change(delete);
    let deleted = || scene.api.written.lock().iter().find(|(m, _, _)| *m == http::Method::DELETE).cloned();
    until("the object is deleted", || deleted().is_some()).await;
    assert_eq!(deleted().unwrap().2["gracePeriodSeconds"], 0);
    assert_eq!(deleted().unwrap().2["preconditions"]["uid"], "u");
    assert_eq!(scene.api.status()["phase"], "Failed");
    scene.update.send_modify(|update| update.removed = true);
    scene.worker.await.unwrap();
    assert!(scene.runtime.sandboxes().is_empty());
    assert!(!scene.dir.path().join("nodes/node/pods/u").exists());
    assert!(scene.shared.pods.read().is_empty());
}

#[tokio::test]
async fn a_forced_deletion_still_stops_what_runs() {
    let scene = begin(&pod(json!({"containers": [{"name": "a", "image": "i"}]})), |_| Adopted::default());
    scene.running(0).await;
    scene.change(|pod| {
        delete(pod);
        pod.metadata.deletion_grace_period_seconds = Some(0);
    });
    scene.update.send_modify(|update| update.removed = true);
    scene.worker.await.unwrap();
    let calls = scene.runtime.calls();
    assert!(calls.contains(&"stop a-0 1s".to_owned()), "{calls:?}");
    assert!(calls.contains(&"remove sandbox-p-0".to_owned()), "{calls:?}");
}

#[tokio::test]
async fn a_missing_config_map_is_named_and_waited_for() {
    let spec = json!({"containers": [{"name": "a", "image": "i", "env": [
        {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}}]}]});
    let scene = begin(&pod(spec), |_| Adopted::default());
    until("the reason", || scene.container()["state"]["waiting"]["reason"] == "CreateContainerConfigError")
        .await;
    assert_eq!(scene.container()["state"]["waiting"]["message"], "configmap \"cm\" not found");
    assert!(scene.runtime.containers().is_empty());
}

#[tokio::test]
async fn a_missing_image_backs_off() {
    let spec = json!({"containers": [{"name": "a", "image": "missing"}]});
    let scene = begin(&pod(spec), |_| Adopted::default());
    until("back-off", || scene.container()["state"]["waiting"]["reason"] == "ImagePullBackOff").await;
    let never = json!({"containers": [{"name": "a", "image": "missing", "imagePullPolicy": "Never"}]});
    let scene = begin(&pod(never), |_| Adopted::default());
    until("the reason", || scene.container()["state"]["waiting"]["reason"] == "ErrImageNeverPull").await;
}

#[tokio::test]
async fn what_an_earlier_kubelet_left_running_is_adopted_untouched() {
    let p = pod(json!({"containers": [{"name": "a", "image": "i"}]}));
    let first = begin(&p, |_| Adopted::default());
    first.running(0).await;
    first.worker.abort();
    let (sandboxes, containers) = (first.runtime.sandboxes(), first.runtime.containers());
    let before = first.runtime.calls();
    let (inbox, messages) = Inbox::new();
    let update = watch::Sender::new(Update { pod: p, removed: false, rejected: None });
    let api = Arc::new(FakeApi::default());
    let shared = shared(first.dir.path(), first.runtime.clone(), &api);
    tokio::spawn(run(
        shared,
        update.subscribe(),
        (inbox.clone(), messages),
        Adopted { sandboxes, containers },
    ));
    until("its status", || api.status()["containerStatuses"][0]["ready"] == true).await;
    assert_eq!(first.runtime.calls(), before, "nothing was made, started or stopped");
    // And it is still looked after.
    first.runtime.exit("a-0", 1);
    inbox.offer(Message::Exited("a-0".into()));
    until("it is started again", || first.runtime.calls().contains(&"start a-1".to_owned())).await;
}

#[tokio::test]
async fn a_pod_that_is_done_releases_its_sandbox_and_stays_readable() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "a", "image": "i"}]});
    let scene = begin(&pod(spec), |_| Adopted::default());
    scene.running(0).await;
    scene.tell(scene.runtime.exit("a-0", 0));
    until("it has succeeded", || scene.api.status()["phase"] == "Succeeded").await;
    until("the sandbox is stopped", || scene.runtime.calls().contains(&"stop sandbox-p-0".to_owned())).await;
    assert_eq!(scene.api.status()["podIP"], "10.42.0.9");
    let pods = scene.shared.pods.read();
    assert_eq!(pods[&("n".to_owned(), "p".to_owned())].containers["a"], [(0, "a-0".to_owned())]);
}

#[tokio::test]
async fn a_readiness_probe_decides() {
    let spec = json!({"containers": [{"name": "a", "image": "i",
        "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}},
        {"name": "b", "image": "i", "readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}}]});
    let scene = begin(&pod(spec), |_| Adopted::default());
    until("a is ready", || scene.container()["ready"] == true).await;
    until("b is said to be unhealthy", || scene.api.events().contains(&"Unhealthy".to_owned())).await;
    assert_eq!(scene.api.status()["containerStatuses"][1]["ready"], false);
}

#[tokio::test]
async fn a_refused_pod_fails_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = FakeRuntime::new(dir.path().to_owned());
    let api = Arc::new(FakeApi::default());
    let shared = shared(dir.path(), runtime.clone(), &api);
    let rejected = Some(Rejection { reason: "OutOfcpu".into(), message: "m".into() });
    let pod = pod(json!({"containers": [{"name": "a", "image": "i"}]}));
    let update = watch::Sender::new(Update { pod, removed: false, rejected });
    tokio::spawn(run(shared, update.subscribe(), Inbox::new(), Adopted::default()));
    until("it has failed", || api.status()["phase"] == "Failed").await;
    assert_eq!(api.status()["reason"], "OutOfcpu");
    assert!(runtime.calls().is_empty());
}

#[tokio::test]
async fn a_dead_sandbox_is_replaced_and_all_of_them_go_with_the_pod() {
    let scene = begin(&pod(json!({"containers": [{"name": "a", "image": "i"}]})), |_| Adopted::default());
    scene.running(0).await;
    scene.runtime.exit("a-0", 137);
    scene.inbox.offer(Message::SandboxDied("sandbox-p-0".into()));
    scene.running(1).await;
    let names = || scene.runtime.sandboxes().into_iter().map(|s| s.id).collect::<Vec<_>>();
    assert_eq!(names(), ["sandbox-p-0", "sandbox-p-1"]);
    until("it is said", || scene.api.events().contains(&"SandboxChanged".to_owned())).await;
    scene.update.send_modify(|update| update.removed = true);
    scene.worker.await.unwrap();
    assert!(scene.runtime.sandboxes().is_empty());
}
