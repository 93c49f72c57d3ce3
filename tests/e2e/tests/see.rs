//! What an administrator sees of the network: `weft service`, `why`, `flows`, `net check` and `doctor` on three nodes.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use weft_tests_e2e::{agent_of, cluster, eventually};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(30);

/// A Deployment on every node, a pod on one, a pod that is never ready, and Services that go well or wrong in one way each.
const WORKLOAD: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: nginx, image: \"nginx:1.22\", ports: [{name: http, containerPort: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: one, labels: {app: one}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers: [{name: nginx, image: \"nginx:1.22\"}]
---
apiVersion: v1
kind: Pod
metadata: {name: lazy, labels: {app: lazy}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: busybox, command: [sleep, \"100000\"], readinessProbe: {exec: {command: [\"false\"]}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: busybox, command: [sleep, \"100000\"]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{name: http, port: 80, targetPort: http, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: one}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: one}, ports: [{port: 80, nodePort: 30081}]}
---
apiVersion: v1
kind: Service
metadata: {name: wrong-target}
spec: {selector: {app: one}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: misnamed}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: https}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: lazy}
spec: {selector: {app: lazy}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {clusterIP: None, selector: {app: one}, ports: [{port: 80}]}
";

#[test]
fn what_the_administrator_sees() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("see::what_the_administrator_sees", "see", &["--nodes", "3"])? else {
        return Ok(());
    };
    cluster.apply(WORKLOAD)?;
    cluster.kubectl(&["wait", "pod/client", "pod/one", "--for=condition=Ready", "--timeout=60s"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    eventually(&cluster, &["get", "pod", "lazy", "-o", "jsonpath={.status.phase}"], |phase| {
        phase == "Running"
    })?;
    services(&cluster)?;
    ways_that_work(&cluster)?;
    ways_that_do_not(&cluster)?;
    flows(&cluster)?;
    policies(&cluster)?;
    check(&cluster)?;
    doctor(&cluster)?;
    without_an_agent(&cluster)?;
    cluster.purge()
}

/// What a command wrote, and how it ended.
fn weft(cluster: &Cluster, args: &[&str]) -> anyhow::Result<(String, i32)> {
    let output = cluster.weft()?.args(args).stdin(Stdio::null()).output()?;
    let code = output.status.code().context("it was ended by a signal")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(code < 2, "weft {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok((said, code))
}

fn json(cluster: &Cluster, args: &[&str]) -> anyhow::Result<(Value, i32)> {
    let mut args = args.to_vec();
    args.extend(["-o", "json"]);
    let (said, code) = weft(cluster, &args)?;
    Ok((serde_json::from_str(&said).with_context(|| said.clone())?, code))
}

fn services(cluster: &Cluster) -> anyhow::Result<()> {
    let list = || -> anyhow::Result<Option<String>> {
        let (said, code) = weft(cluster, &["service", "list", "-n", "default"])?;
        Ok((code == 0).then_some(said))
    };
    let said = wait_until("every node has every Service", PATIENCE, list)?;
    let row = |name: &str| {
        let mut rows = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.find(|row| row.get(1) == Some(&name)).with_context(|| said.clone())
    };
    assert_eq!(row("web")?[5..], ["80:30080/TCP", "3/3", "3/3"], "{said}");
    assert_eq!(row("lazy")?[5..], ["80/TCP", "0/1", "3/3"], "{said}");
    assert_eq!(row("headless")?[5..], ["80/TCP", "1/1", "-"], "the kernel knows nothing of it");

    let (shown, code) = json(cluster, &["service", "show", "default/one"])?;
    assert_eq!(code, 0);
    for (node, outside) in [("node-1", 0), ("node-2", 1), ("node-3", 0)] {
        let held = &shown["nodes"][node];
        assert_eq!(held["programmed"], true, "{held}");
        let frontends = held["frontends"].as_array().context("a list")?;
        let entry = |scope: &str| {
            frontends
                .iter()
                .find(|entry| entry["address"] == "0.0.0.0" && entry["scope"] == scope)
                .context("an entry")
        };
        assert_eq!(
            entry("outside")?["backends"].as_array().map(Vec::len),
            Some(outside),
            "policy Local: {held}"
        );
        assert_eq!(entry("inside")?["backends"].as_array().map(Vec::len), Some(1), "{held}");
        assert_eq!(held["backends"][0]["active"], true, "{held}");
    }
    assert_eq!(shown["endpoints"][0]["pod"], "default/one");
    let (text, _) = weft(cluster, &["service", "show", "one"])?;
    assert!(text.contains("on 3 of 3 nodes"), "{text}");
    Ok(())
}

/// From, to, and steps that the answer must have: name, node, a part of what it says.
type Way<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str, &'a str)]);

fn ways_that_work(cluster: &Cluster) -> anyhow::Result<()> {
    let ways: [Way<'_>; 7] = [
        (
            "default/client",
            "default/one:80",
            &[
                ("backend", "node-1", "the only one"),
                ("route", "node-1", "by weft.vx, through the tunnel to node-2"),
                ("listen", "node-2", "pod default/one listens at 80/TCP"),
                ("return", "node-2", "through the tunnel to node-1"),
            ],
        ),
        (
            "client",
            "web:http",
            &[("backend", "node-1", "one of 3, at random"), ("listen", "node-3", "listens")],
        ),
        ("node-3", "svc/one:80", &[("return", "node-2", "through the tunnel to node-3")]),
        ("client", "pod/one:80", &[("service", "node-1", "is no Service"), ("listen", "node-2", "listens")]),
        ("client", "headless:80", &[("service", "node-1", "is no Service")]),
        (
            "192.0.2.1",
            "node-2:30081",
            &[("service", "node-2", "keep-source"), ("return", "node-2", "to 192.0.2.1")],
        ),
        (
            "192.0.2.1",
            "web:80",
            &[("service", "node-3", "node:30080/TCP"), ("return", "node-1", "stays on the node")],
        ),
    ];
    for (from, to, steps) in ways {
        let (report, code) = json(cluster, &["why", from, to])?;
        assert_eq!((code, &report["outcome"]), (0, &Value::from("reachable")), "{from} {to}: {report:#}");
        for (name, node, says) in steps {
            let found = report["steps"].as_array().is_some_and(|all| {
                all.iter().any(|step| {
                    step["name"] == *name
                        && step["node"] == *node
                        && step["says"].as_str().is_some_and(|text| text.contains(says))
                })
            });
            assert!(found, "{from} {to}: no step {name} on {node} says {says:?}: {report:#}");
        }
    }
    // The answer is what happens.
    let said = cluster.kubectl(&["exec", "client", "--", "wget", "-qO-", "http://one/hostname"])?;
    assert_eq!(said.trim(), "one");
    Ok(())
}

fn ways_that_do_not(cluster: &Cluster) -> anyhow::Result<()> {
    // From, to, the step that decides, what it says, and the object behind it.
    let ways = [
        (
            "client",
            "nobody:80",
            "backend",
            "no pod matches the selector app=nobody",
            "Service default/nobody",
        ),
        (
            "client",
            "lazy:80",
            "backend",
            "lazy (container main runs, and its readiness probe",
            "Pod default/lazy",
        ),
        ("client", "misnamed:80", "backend", "targetPort is \"https\"", "Service default/misnamed"),
        (
            "client",
            "web:81",
            "service",
            "does not serve port 81/TCP; it serves 80/TCP (http)",
            "Service default/web",
        ),
        (
            "client",
            "wrong-target:80",
            "listen",
            "no process of pod default/one listens at 8080",
            "Pod default/one",
        ),
        ("client", "nothing:80", "name", "there is no Service default/nothing", ""),
        (
            "192.0.2.1",
            "node-1:30081",
            "backend",
            "this node has no ready endpoint: they are on node-2",
            "Service default/one",
        ),
        ("192.0.2.1", "lazy:80", "name", "it has no address outside the cluster", "Service default/lazy"),
    ];
    for (from, to, name, says, object) in ways {
        let (report, code) = json(cluster, &["why", from, to])?;
        assert_eq!((code, &report["outcome"]), (1, &Value::from("unreachable")), "{from} {to}: {report:#}");
        let decides = &report["decidedBy"];
        assert_eq!(decides["name"], name, "{from} {to}: {report:#}");
        assert!(decides["says"].as_str().is_some_and(|text| text.contains(says)), "{from} {to}: {report:#}");
        assert_eq!(decides["object"].as_str().unwrap_or_default(), object, "{from} {to}: {report:#}");
    }
    let (text, _) = weft(cluster, &["why", "client", "nobody:80"])?;
    let last = "not reachable: decided by backend on node-1: no pod matches the selector app=nobody (Service default/nobody)\n";
    assert!(text.ends_with(last), "{text}");
    let (report, code) = json(cluster, &["why", "192.0.2.1", "one:80"])?;
    assert_eq!((code, &report["outcome"]), (1, &Value::from("partly")), "over one node of three: {report:#}");
    Ok(())
}

fn flows(cluster: &Cluster) -> anyhow::Result<()> {
    let mut watcher = cluster
        .weft()?
        .args(["flows", "--pod", "client", "--count", "3", "-o", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let errors = BufReader::new(watcher.stderr.take().context("a pipe")?);
    let first = errors.lines().next().context("it says that it watches")??;
    assert_eq!(first, "watching 3 node(s)");
    cluster.kubectl(&["exec", "client", "--", "wget", "-qO-", "http://one/hostname"])?;
    cluster.kubectl_fails(&["exec", "client", "--", "wget", "-qO-", "http://nobody/"])?;
    cluster.kubectl_fails(&["exec", "client", "--", "wget", "-qO-", "http://one:81/"])?;
    let output = watcher.wait_with_output()?;
    ensure!(output.status.success(), "{output:?}");
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    let seen: Vec<Value> = seen.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let is = |flow: &Value, kind: &str, service: &str| {
        flow["kind"] == kind
            && flow["node"] == "node-1"
            && flow["source"]["pod"] == "default/client"
            && flow["destination"]["service"] == service
    };
    assert!(is(&seen[0], "connect", "default/one"), "{seen:#?}");
    assert_eq!(seen[0]["backend"]["pod"], "default/one", "{seen:#?}");
    assert!(is(&seen[1], "drop", "default/nobody"), "{seen:#?}");
    assert_eq!(seen[1]["reason"], "socket_no_endpoints");
    assert!(is(&seen[2], "drop", "default/one"), "{seen:#?}");
    assert_eq!(seen[2]["reason"], "socket_unknown_port");
    Ok(())
}

const GUARD: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard}
spec:
  podSelector: {matchLabels: {app: one}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]
";

/// A policy keeps one client out and lets another in; both are explained, and the first is seen to be dropped.
fn policies(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(GUARD)?;
    let denied = wait_until("the policy is in the kernel", PATIENCE, || {
        let (report, code) = json(cluster, &["why", "client", "one:80"])?;
        Ok((code == 1).then_some(report))
    })?;
    let decides = &denied["decidedBy"];
    assert_eq!((&decides["name"], &decides["node"]), (&"policy".into(), &"node-2".into()), "{denied:#}");
    assert_eq!(decides["object"], "NetworkPolicy default/guard", "{denied:#}");
    let says = decides["says"].as_str().unwrap_or_default();
    assert!(says.starts_with("no NetworkPolicy allows ingress of pod default/one from 10."), "{says}");

    let web =
        cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}"])?;
    let (allowed, code) = json(cluster, &["why", web.trim(), "one:80"])?;
    assert_eq!(code, 0, "{allowed:#}");
    let restricted = |step: &Value| step["name"] == "policy" && step["verdict"] == "ok";
    assert!(allowed["steps"].as_array().is_some_and(|steps| steps.iter().any(restricted)), "{allowed:#}");

    let mut watcher = cluster
        .weft()?
        .args(["flows", "--drops", "--pod", "one", "--count", "1", "-o", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    BufReader::new(watcher.stderr.take().context("a pipe")?).lines().next().context("it watches")??;
    cluster.kubectl_fails(&[
        "exec",
        "client",
        "--",
        "timeout",
        "2",
        "wget",
        "-qO-",
        "http://one/hostname",
    ])?;
    let seen: Value = serde_json::from_slice(&watcher.wait_with_output()?.stdout)?;
    assert_eq!((&seen["kind"], &seen["reason"]), (&"drop".into(), &"policy_ingress".into()), "{seen:#}");
    assert_eq!(seen["source"]["pod"], "default/client", "{seen:#}");

    cluster.kubectl(&["delete", "networkpolicy", "guard"])?;
    wait_until("the policy is gone", PATIENCE, || {
        Ok((json(cluster, &["why", "client", "one:80"])?.1 == 0).then_some(()))
    })
}

/// Every way between three nodes works, and nothing of the check stays.
fn check(cluster: &Cluster) -> anyhow::Result<()> {
    let missing = cluster.weft()?.args(["net", "check", "--image", "nothing:1"]).output()?;
    assert_eq!(missing.status.code(), Some(2));
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(said.contains("has no image nothing:1: import it with `weft image import`"), "{said}");

    let (lines, code) = json(cluster, &["net", "check"])?;
    let lines = lines.as_array().context("a list")?;
    assert_eq!(code, 0, "{lines:#?}");
    for (check, count) in
        [("pod", 18), ("body", 9), ("service", 18), ("nodeport", 18), ("hairpin", 3), ("dns", 3)]
    {
        let of = lines.iter().filter(|line| line["check"] == check && line["outcome"] == "ok");
        assert_eq!(of.count(), count, "{check}: from pods and nodes, to every node: {lines:#?}");
    }
    let gone = |namespaces: &str| !namespaces.contains("weft-net-check");
    eventually(cluster, &["get", "namespaces"], gone)?;
    Ok(())
}

/// A sound cluster has nothing broken.
fn doctor(cluster: &Cluster) -> anyhow::Result<()> {
    let (findings, code) = json(cluster, &["doctor"])?;
    assert_eq!(code, 0, "{findings:#}");
    let looked_at = |what: &str, node: &str| {
        let mut all = findings.as_array().into_iter().flatten();
        all.any(|finding| finding["what"] == what && finding["node"] == node && finding["level"] == "ok")
    };
    for what in ["agent", "kernel", "cgroup", "bpffs", "hooks", "maps", "mtu", "overlay", "lease"] {
        assert!(looked_at(what, "node-2"), "{what}: {findings:#}");
    }
    Ok(())
}

fn pod_on(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let field = format!("spec.nodeName={node}");
    let ip = "jsonpath={.items[0].status.podIP}";
    cluster.kubectl(&["get", "pods", "-l", "app=web", "--field-selector", &field, "-o", ip])
}

fn in_namespace(namespace: &str, command: &[&str]) -> anyhow::Result<String> {
    let output =
        std::process::Command::new("nsenter").arg(format!("--net={namespace}")).args(command).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The kernel goes on without an agent, and can still be asked. What is then taken from it stays away, and is named.
fn without_an_agent(cluster: &Cluster) -> anyhow::Result<()> {
    let agent = agent_of(cluster, "node-2")?;
    let namespace = std::fs::File::open(format!("/proc/{agent}/ns/net"))?;
    let namespace =
        format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&namespace));
    kill(agent, Signal::SIGTERM)?;
    wait_until("the agent is gone", PATIENCE, || Ok(agent_of(cluster, "node-2").is_err().then_some(())))?;
    let (report, code) = json(cluster, &["why", "node-2", "web:80"])?;
    assert_eq!(code, 0, "{report:#}");
    let (shown, code) = json(cluster, &["service", "show", "web"])?;
    assert_eq!(code, 0, "{shown:#}");
    assert_eq!(
        shown["nodes"]["node-2"]["frontends"][0]["backends"].as_array().map(Vec::len),
        Some(3),
        "{shown:#}"
    );

    // A neighbour behind the tunnel vanishes: packets to node-3 go nowhere.
    let range = cluster.kubectl(&["get", "node", "node-3", "-o", "jsonpath={.spec.podCIDR}"])?;
    let gateway = range.split('/').next().context("a range")?.to_owned();
    in_namespace(&namespace, &["ip", "neigh", "del", &gateway, "dev", "weft.vx"])?;
    let (findings, code) = json(cluster, &["doctor"])?;
    assert_eq!(code, 1, "{findings:#}");
    let broken = |what: &str| {
        let mut all = findings.as_array().into_iter().flatten();
        let found = all.find(|finding| finding["what"] == what && finding["level"] == "fail");
        found.filter(|finding| finding["node"] == "node-2").and_then(|finding| finding["says"].as_str())
    };
    assert!(broken("agent").is_some(), "{findings:#}");
    let says = broken("overlay").unwrap_or_default();
    assert!(says.contains(&format!("to node-3: no neighbour entry for {gateway}")), "{findings:#}");
    let (report, code) = json(cluster, &["why", "node-2", &format!("{}:80", pod_on(cluster, "node-3")?)])?;
    assert_eq!((code, &report["decidedBy"]["name"]), (1, &"route".into()), "{report:#}");
    Ok(())
}
