//! Rows of specification and observation → actions.

use super::*;
use crate::observed::{ProbeState, SandboxView};
use serde_json::{Value, json};
use weft_agent_runtime::{ContainerState, Exit};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec}))
        .unwrap()
}

fn sandbox() -> SandboxView {
    SandboxView { id: "s0".into(), attempt: 0, ready: true, ips: vec!["10.42.0.2".parse().unwrap()] }
}

fn up() -> Observed {
    Observed { volumes_ready: true, sandbox: Some(sandbox()), ..Observed::default() }
}

fn view(id: &str, attempt: u32, state: ContainerState) -> ContainerView {
    ContainerView {
        id: id.into(),
        sandbox_id: "s0".into(),
        attempt,
        hash: String::new(),
        image: "i".into(),
        image_id: "sha256:0".into(),
        state,
        message: None,
        message_file: None,
    }
}

fn running(id: &str) -> ContainerView {
    view(id, 0, ContainerState::Running { started_at_ns: 0 })
}

fn exited(id: &str, attempt: u32, code: i32, second: i64) -> ContainerView {
    let finished_at_ns = i64::try_from(at(second).as_nanosecond()).unwrap();
    view(id, attempt, ContainerState::Exited(Exit { code, finished_at_ns, ..Exit::default() }))
}

fn start(name: &str, attempt: u32) -> Action {
    Action::Start { name: name.into(), attempt }
}

#[test]
fn a_new_pod_gets_volumes_then_a_sandbox_then_its_containers_one_by_one() {
    let p = pod(json!({"containers": [{"name": "a"}, {"name": "b"}]}));
    let mut o = Observed::default();
    assert_eq!(next(&p, &o, at(0)).actions, [Action::MountVolumes]);
    o.busy = true;
    assert_eq!(next(&p, &o, at(0)), Plan::default());
    (o.busy, o.volumes_ready) = (false, true);
    assert_eq!(next(&p, &o, at(0)).actions, [Action::CreateSandbox { attempt: 0 }]);
    o.sandbox = Some(sandbox());
    assert_eq!(next(&p, &o, at(0)).actions, [start("a", 0)]);
    o.record("a", running("a0"));
    assert_eq!(next(&p, &o, at(0)).actions, [start("b", 0)]);
    o.record("b", running("b0"));
    assert_eq!(next(&p, &o, at(0)), Plan::default());
}

#[test]
fn init_containers_run_in_order_and_a_sidecar_only_has_to_start() {
    let p = pod(json!({"containers": [{"name": "main"}], "initContainers": [
        {"name": "i1"}, {"name": "side", "restartPolicy": "Always"}, {"name": "i2"}]}));
    let mut o = up();
    assert_eq!(next(&p, &o, at(0)).actions, [start("i1", 0)]);
    o.record("i1", running("x"));
    assert_eq!(next(&p, &o, at(0)).actions, []);
    o.record("i1", exited("x", 0, 0, 0));
    assert_eq!(next(&p, &o, at(0)).actions, [start("side", 0)]);
    o.record("side", running("s"));
    assert_eq!(next(&p, &o, at(0)).actions, [start("i2", 0)]);
    o.record("i2", exited("y", 0, 0, 0));
    assert_eq!(next(&p, &o, at(0)).actions, [start("main", 0)]);
    o.record("main", running("m"));
    o.record("side", exited("s", 0, 1, 0));
    assert_eq!(next(&p, &o, at(0)).actions, [start("side", 1)]);
}

#[test]
fn policies_decide_what_is_started_again() {
    for (policy, code, expected) in [
        ("Always", 0, start("a", 1)),
        ("Always", 1, start("a", 1)),
        ("OnFailure", 1, start("a", 1)),
        ("OnFailure", 0, Action::Finish),
        ("Never", 1, Action::Finish),
    ] {
        let p = pod(json!({"containers": [{"name": "a"}], "restartPolicy": policy}));
        let mut o = up();
        o.record("a", exited("a0", 0, code, 0));
        assert_eq!(next(&p, &o, at(1)).actions, [expected], "{policy} {code}");
    }
}

#[test]
fn a_crashing_container_waits_out_its_delay() {
    let p = pod(json!({"containers": [{"name": "a"}]}));
    let mut o = up();
    o.record("a", exited("a0", 0, 1, 0));
    o.crashes.next("a", at(0), at(0));
    o.record("a", exited("a1", 1, 1, 1));
    let plan = next(&p, &o, at(1));
    assert_eq!((plan.actions, plan.wake_at), (vec![], Some(at(11))));
    assert_eq!(plan.crash_looping, [("a".to_owned(), Duration::from_secs(10))]);
    assert_eq!(next(&p, &o, at(11)).actions, [start("a", 2)]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let p = pod(
        json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}], "restartPolicy": "Never"}),
    );
    let mut o = up();
    o.record("i", exited("i0", 0, 1, 0));
    assert_eq!(next(&p, &o, at(0)).actions, [Action::Finish]);
}

#[test]
fn probes_and_changed_definitions_kill_once() {
    let p = pod(json!({"containers": [{"name": "a", "image": "x"}]}));
    let mut o = up();
    let mut c = running("a0");
    c.hash = pod::container_hash(&pod::containers(&p)[0]);
    o.record("a", c.clone());
    assert_eq!(next(&p, &o, at(0)), Plan::default());
    o.probes.insert("a0".into(), ProbeState { liveness_failed: true, ..ProbeState::default() });
    let why = |o: &Observed| match next(&p, o, at(0)).actions.pop() {
        Some(Action::Kill { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(&o), "Container a failed liveness probe, will be restarted");
    o.stopping.insert("a0".into());
    assert_eq!(next(&p, &o, at(0)).actions, []);
    o.stopping.clear();
    o.probes.clear();
    c.hash = "old".into();
    o.record("a", c);
    assert_eq!(why(&o), "Container a definition changed, will be restarted");
}

#[test]
fn a_dead_sandbox_is_replaced_unless_the_pod_is_done() {
    let dead = |o: &mut Observed| o.sandbox.as_mut().unwrap().ready = false;
    let p = pod(json!({"containers": [{"name": "a"}], "restartPolicy": "Always"}));
    let mut o = up();
    o.record("a", exited("a0", 0, 137, 0));
    dead(&mut o);
    assert_eq!(next(&p, &o, at(0)).actions, [Action::CreateSandbox { attempt: 1 }]);
    o.record("a", running("a0"));
    assert_eq!(next(&p, &o, at(0)).actions, [], "its containers' ends come first");
    let p = pod(json!({"containers": [{"name": "a"}], "restartPolicy": "Never"}));
    o.record("a", exited("a0", 0, 137, 0));
    assert_eq!(next(&p, &o, at(0)).actions, [Action::Finish]);
}

#[test]
fn an_ending_pod_stops_main_containers_then_sidecars_backwards_then_the_sandbox() {
    let p = pod(json!({"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [
        {"name": "s1", "restartPolicy": "Always"}, {"name": "s2", "restartPolicy": "Always"}]}));
    let mut o = up();
    for name in ["a", "b", "s1", "s2"] {
        o.record(name, running(name));
    }
    o.ending = Some(Ending::Deleted);
    let names = |o: &Observed| -> Vec<String> {
        let actions = next(&p, o, at(0)).actions;
        actions
            .into_iter()
            .map(|a| if let Action::Kill { name, .. } = a { name } else { format!("{a:?}") })
            .collect()
    };
    assert_eq!(names(&o), ["a", "b"]);
    o.stopping.insert("a".into());
    assert_eq!(names(&o), ["b"]);
    o.record("a", exited("a", 0, 0, 0));
    o.record("b", exited("b", 0, 0, 0));
    assert_eq!(names(&o), ["s2"]);
    o.record("s2", exited("s2", 0, 0, 0));
    assert_eq!(names(&o), ["s1"]);
    o.record("s1", exited("s1", 0, 0, 0));
    assert_eq!(names(&o), ["StopSandbox"]);
    o.sandbox_stopped = true;
    assert_eq!(next(&p, &o, at(0)), Plan::default());
}

#[test]
fn lost_records_do_not_reset_the_restart_count() {
    let mut p = pod(json!({"containers": [{"name": "a"}]}));
    p.status = serde_json::from_value(json!({"containerStatuses": [{"name": "a", "containerID": "weft://x",
        "restartCount": 4, "image": "", "imageID": "", "ready": true}]}))
    .unwrap();
    assert_eq!(next(&p, &up(), at(0)).actions, [start("a", 5)]);
}
