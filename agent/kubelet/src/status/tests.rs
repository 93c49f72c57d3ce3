//! Rows of pod and observation → what the API server sees.

use super::*;
use crate::observed::{ProbeState, SandboxView, Waiting};
use serde_json::{Value, json};
use weft_agent_runtime::Exit;

fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3},
        "spec": spec, "status": {"conditions": [{"type": "PodScheduled", "status": "True"},
            {"type": "example.com/gate", "status": "False"}]}}))
    .unwrap()
}

fn view(state: runtime::ContainerState) -> ContainerView {
    ContainerView {
        id: "abc".into(),
        sandbox_id: "s".into(),
        attempt: 0,
        hash: String::new(),
        image: "nginx".into(),
        image_id: "sha256:1".into(),
        state,
        message: Some("bye".into()),
        message_file: None,
    }
}

fn running() -> ContainerView {
    view(runtime::ContainerState::Running { started_at_ns: 5_000_000_000 })
}

fn exited(code: i32) -> ContainerView {
    view(runtime::ContainerState::Exited(Exit { code, ..Exit::default() }))
}

fn up() -> Observed {
    let sandbox =
        SandboxView { id: "s".into(), attempt: 0, ready: true, ips: vec!["10.42.0.7".parse().unwrap()] };
    Observed { volumes_ready: true, sandbox: Some(sandbox), ..Observed::default() }
}

fn see(pod: &Pod, observed: &Observed) -> PodStatus {
    generate(pod, observed, &["10.0.0.1".parse().unwrap()], Timestamp::from_second(100).unwrap())
}

fn condition<'a>(status: &'a PodStatus, type_: &str) -> (&'a str, &'a str, &'a str) {
    let c = status.conditions.iter().flatten().find(|c| c.type_ == type_).unwrap();
    (&c.status, c.reason.as_deref().unwrap_or(""), c.message.as_deref().unwrap_or(""))
}

#[test]
fn a_pod_that_is_being_made() {
    let p = pod(json!({"containers": [{"name": "a", "image": "nginx"}]}));
    let s = see(&p, &Observed::default());
    assert_eq!((s.phase.as_deref(), s.pod_ip.as_deref()), (Some("Pending"), None));
    assert_eq!(s.qos_class.as_deref(), Some("BestEffort"));
    let a = &s.container_statuses.as_ref().unwrap()[0];
    assert_eq!(
        a.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
        Some("ContainerCreating")
    );
    assert_eq!(
        condition(&s, "Ready"),
        ("False", "ContainersNotReady", "containers with unready status: [a]")
    );
    assert_eq!(condition(&s, "PodReadyToStartContainers").0, "False");
    assert_eq!(condition(&s, "Initialized").0, "True");
    assert!(s.conditions.iter().flatten().any(|c| c.type_ == "example.com/gate"), "foreign conditions stay");
    assert_eq!(s.conditions.iter().flatten().next().unwrap().observed_generation, Some(3));
}

#[test]
fn a_running_pod_and_its_readiness() {
    let p = pod(json!({"containers": [{"name": "a"}]}));
    let mut o = up();
    o.record("a", running());
    let s = see(&p, &o);
    assert_eq!(
        (s.phase.as_deref(), s.pod_ip.as_deref(), s.host_ip.as_deref()),
        (Some("Running"), Some("10.42.0.7"), Some("10.0.0.1"))
    );
    let a = &s.container_statuses.as_ref().unwrap()[0];
    assert_eq!((a.ready, a.started, a.container_id.as_deref()), (true, Some(true), Some("weft://abc")));
    assert_eq!(condition(&s, "Ready").0, "True");

    let probed = pod(json!({"containers": [{"name": "a", "readinessProbe": {}}]}));
    assert_eq!(condition(&see(&probed, &o), "Ready").0, "False");
    o.probes.insert("abc".into(), ProbeState { ready: Some(true), ..ProbeState::default() });
    assert_eq!(condition(&see(&probed, &o), "Ready").0, "True");

    let slow = pod(json!({"containers": [{"name": "a", "startupProbe": {}}]}));
    let a = see(&slow, &o).container_statuses.unwrap().remove(0);
    assert_eq!((a.ready, a.started), (false, Some(false)));

    let gated = pod(
        json!({"containers": [{"name": "a"}], "readinessGates": [{"conditionType": "example.com/gate"}]}),
    );
    let s = see(&gated, &o);
    assert_eq!(condition(&s, "ContainersReady").0, "True");
    assert_eq!(condition(&s, "Ready").1, "ReadinessGatesNotReady");
}

#[test]
fn the_primary_familys_addresses_come_first() {
    let node: [IpAddr; 2] = ["fd44::1", "10.0.0.1"].map(|ip| ip.parse().unwrap());
    let now = Timestamp::from_second(100).unwrap();
    let listed = |status: &PodStatus| {
        let pod = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect::<Vec<_>>().join(" ");
        let host = status.host_ips.iter().flatten().map(|ip| ip.ip.clone()).collect::<Vec<_>>().join(" ");
        assert_eq!(status.pod_ip.as_deref(), pod.split(' ').next());
        assert_eq!(status.host_ip.as_deref(), host.split(' ').next());
        (pod, host)
    };
    let mut o = up();
    if let Some(sandbox) = &mut o.sandbox {
        sandbox.ips = ["10.42.0.7", "fd42::7"].map(|ip| ip.parse().unwrap()).into();
    }
    let own = pod(json!({"containers": [{"name": "a"}]}));
    let six_first = generate(&own, &o, &node, now);
    assert_eq!(listed(&six_first), ("fd42::7 10.42.0.7".to_owned(), "fd44::1 10.0.0.1".to_owned()));
    let four_first = generate(&own, &o, &[node[1], node[0]], now);
    assert_eq!(listed(&four_first), ("10.42.0.7 fd42::7".to_owned(), "10.0.0.1 fd44::1".to_owned()));
    let host = pod(json!({"hostNetwork": true, "containers": [{"name": "a"}]}));
    let on_host = generate(&host, &o, &node, now);
    assert_eq!(listed(&on_host), ("fd44::1 10.0.0.1".to_owned(), "fd44::1 10.0.0.1".to_owned()));
}

#[test]
fn phases_of_ended_pods() {
    for (policy, code, ending, expected) in [
        ("Never", 0, None, "Succeeded"),
        ("Never", 1, None, "Failed"),
        ("OnFailure", 0, None, "Succeeded"),
        ("OnFailure", 1, None, "Running"),
        ("Always", 0, None, "Running"),
        ("Always", 0, Some(Ending::Deleted), "Succeeded"),
        ("Always", 137, Some(Ending::Deleted), "Failed"),
    ] {
        let p = pod(json!({"containers": [{"name": "a"}], "restartPolicy": policy}));
        let mut o = up();
        o.record("a", exited(code));
        o.ending.clone_from(&ending);
        assert_eq!(see(&p, &o).phase.as_deref(), Some(expected), "{policy} {code} {ending:?}");
    }
}

#[test]
fn an_ended_pod_never_comes_back() {
    let mut p = pod(json!({"containers": [{"name": "a"}]}));
    p.status.as_mut().unwrap().phase = Some("Failed".into());
    let mut o = up();
    o.record("a", running());
    assert_eq!(see(&p, &o).phase.as_deref(), Some("Failed"));
}

#[test]
fn crash_loops_show_what_happened_last() {
    let p = pod(json!({"containers": [{"name": "a"}]}));
    let mut o = up();
    o.record("a", exited(3));
    let a = see(&p, &o).container_statuses.unwrap().remove(0);
    let ended = a.state.unwrap().terminated.unwrap();
    assert_eq!(
        (ended.reason.as_deref(), ended.exit_code, ended.message.as_deref()),
        (Some("Error"), 3, Some("bye"))
    );
    let retry_at = Timestamp::from_second(110).unwrap();
    o.waiting
        .insert("a".into(), Waiting { reason: "CrashLoopBackOff".into(), message: "m".into(), retry_at });
    let a = see(&p, &o).container_statuses.unwrap().remove(0);
    assert_eq!(a.state.unwrap().waiting.unwrap().reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(a.last_state.unwrap().terminated.unwrap().exit_code, 3);
}

#[test]
fn init_containers_hold_back_the_others() {
    let p = pod(json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}));
    let mut o = up();
    o.record("i", running());
    let s = see(&p, &o);
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(
        condition(&s, "Initialized"),
        ("False", "ContainersNotInitialized", "containers with incomplete status: [i]")
    );
    let a = &s.container_statuses.as_ref().unwrap()[0];
    assert_eq!(
        a.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
        Some("PodInitializing")
    );
}

#[test]
fn refused_and_overdue_pods_say_why() {
    let p = pod(json!({"containers": [{"name": "a"}]}));
    let mut o = Observed {
        ending: Some(Ending::Rejected { reason: "OutOfcpu".into(), message: "m".into() }),
        ..Observed::default()
    };
    let s = see(&p, &o);
    assert_eq!(
        (s.phase.as_deref(), s.reason.as_deref(), s.message.as_deref()),
        (Some("Failed"), Some("OutOfcpu"), Some("m"))
    );
    o.ending = Some(Ending::DeadlineExceeded);
    assert_eq!(see(&p, &o).reason.as_deref(), Some("DeadlineExceeded"));
}

#[test]
fn times_of_unchanged_conditions_stay() {
    let mut p = pod(json!({"containers": [{"name": "a"}]}));
    let first = see(&p, &Observed::default());
    p.status = Some(first.clone());
    let later = generate(
        &p,
        &Observed::default(),
        &["10.0.0.1".parse().unwrap()],
        Timestamp::from_second(200).unwrap(),
    );
    assert_eq!(first, later);
}
