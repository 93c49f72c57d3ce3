//! The caller's side of CNI: with a plugin that writes down what it is told, and with the reference plugins.

use std::fs;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use weft_agent_runtime::{Bandwidth, Error, PortMapping, Runtime, SandboxSpec};
use weft_tests_harness::require;

use crate::node::{NOOP_PLUGIN, Node, script};

fn calls(node: &Node) -> Vec<String> {
    fs::read_to_string(node.plugin_log()).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn input(call: &str) -> Value {
    serde_json::from_str(&call[call.find('{').unwrap()..]).unwrap()
}

#[tokio::test]
async fn plugins_are_called_as_the_spec_says() {
    if !require("plugins_are_called_as_the_spec_says", &["root"]) {
        return;
    }
    let node = Node::new().await;
    node.network(&json!({"cniVersion": "1.1.0", "name": "t", "plugins": [{"type": "noop", "x": 1}, {"type": "noop", "x": 2}]}));
    fs::remove_file(node.plugin_log()).ok();
    let sandbox = node.runtime().run_sandbox(node.pod()).await.unwrap();
    assert_eq!(sandbox.ips, ["10.42.0.7".parse::<std::net::IpAddr>().unwrap()]);
    let id = sandbox.id;
    node.runtime().check_network(&id).await.unwrap();
    node.runtime().network_status().await.unwrap();
    // The configuration may change meanwhile: DEL uses the one of ADD.
    node.network(&json!({"cniVersion": "1.1.0", "name": "other", "plugins": [{"type": "noop", "x": 3}]}));
    node.runtime().stop_sandbox(&id).await.unwrap();
    node.runtime().stop_sandbox(&id).await.unwrap();
    let calls = calls(&node);
    let verbs: Vec<(&str, i64)> = calls
        .iter()
        .map(|call| (call.split(' ').next().unwrap(), input(call)["x"].as_i64().unwrap()))
        .collect();
    assert_eq!(
        verbs,
        [
            ("ADD", 1),
            ("ADD", 2),
            ("CHECK", 1),
            ("CHECK", 2),
            ("STATUS", 1),
            ("STATUS", 2),
            ("DEL", 2),
            ("DEL", 1)
        ]
    );
    assert!(input(&calls[0]).get("prevResult").is_none());
    for call in [1, 2, 3, 6, 7] {
        assert_eq!(input(&calls[call])["prevResult"]["ips"][0]["address"], "10.42.0.7/24", "{}", calls[call]);
    }
    let netns = node.config.run_dir.join(&node.config.node_name).join("netns").join(&id);
    let head = format!(
        "ADD {id} eth0 {} IgnoreUnknown=1;K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_NAME=p;K8S_POD_NAMESPACE=ns;K8S_POD_UID=uid-1 ",
        netns.display()
    );
    assert!(calls[0].starts_with(&head), "{} is not {head}", calls[0]);
    assert_eq!(input(&calls[7])["name"], "t");
    node.finish().await;
}

#[tokio::test]
async fn capabilities_are_given_to_who_names_them() {
    if !require("capabilities_are_given_to_who_names_them", &["root"]) {
        return;
    }
    let node = Node::new().await;
    let plugins = json!([
        {"type": "noop", "capabilities": {"portMappings": true, "bandwidth": false}},
        {"type": "noop", "capabilities": {"bandwidth": true, "other": true}},
        {"type": "noop"},
    ]);
    node.network(&json!({"cniVersion": "1.1.0", "name": "t", "plugins": plugins}));
    fs::remove_file(node.plugin_log()).ok();
    let mapping = PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: "tcp".to_owned(),
        host_ip: "192.0.2.1".to_owned(),
    };
    let bandwidth = Bandwidth { ingress_bits_per_second: Some(1_000_000), ..Bandwidth::default() };
    let pod = SandboxSpec { port_mappings: vec![mapping], bandwidth, ..node.pod() };
    let id = node.runtime().run_sandbox(pod).await.unwrap().id;
    node.runtime().stop_sandbox(&id).await.unwrap();
    let given: Vec<Value> = calls(&node).iter().map(|call| input(call)["runtimeConfig"].take()).collect();
    let ports = json!({"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"},
    ]});
    let bounds = json!({"bandwidth": {"ingressRate": 1_000_000}});
    // DEL gets what ADD got, in reverse order.
    assert_eq!(given, [ports.clone(), bounds.clone(), Value::Null, Value::Null, bounds, ports]);
    node.finish().await;
}

#[tokio::test]
async fn a_refused_network_leaves_nothing() {
    if !require("a_refused_network_leaves_nothing", &["root"]) {
        return;
    }
    let node = Node::new().await;
    fs::remove_file(node.plugin_log()).ok();
    node.plugin(&NOOP_PLUGIN.replace("if [ \"$CNI_COMMAND\" = ADD ]; then", "if [ \"$CNI_COMMAND\" = ADD ]; then echo '{\"code\":11,\"msg\":\"no more addresses\",\"details\":\"try later\"}'; exit 1;"));
    let error = node.runtime().run_sandbox(node.pod()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"network plugin: plugin type="noop" failed (add): no more addresses; try later"#
    );
    assert_eq!(calls(&node).iter().map(|call| &call[..3]).collect::<Vec<_>>(), ["ADD", "DEL"]);
    assert!(node.runtime().list_sandboxes().await.unwrap().is_empty());
    let data = node.folder.path().join("data/nodes").join(&node.config.node_name);
    assert_eq!(fs::read_dir(data.join("sandboxes")).unwrap().count(), 0);
    let run = node.config.run_dir.join(&node.config.node_name);
    assert_eq!(
        fs::read_dir(run.join("netns")).unwrap().count()
            + fs::read_dir(run.join("sandboxes")).unwrap().count(),
        0
    );

    fs::write(node.config.cni_conf_dir.join("10-test.conflist"), "not json").unwrap();
    assert!(matches!(node.runtime().run_sandbox(node.pod()).await, Err(Error::Network(_))));
    fs::remove_file(node.config.cni_conf_dir.join("10-test.conflist")).unwrap();
    let error = node.runtime().network_status().await.unwrap_err();
    assert!(error.to_string().contains("cni plugin not initialized"), "{error}");
    node.finish().await;
}

/// Joining the sandbox's cgroups takes a process of its own, which a sandbox without a network may not outlive.
#[tokio::test]
async fn a_sandbox_that_is_undone_at_once_leaves_no_process() {
    if !require("a_sandbox_that_is_undone_at_once_leaves_no_process", &["root"]) {
        return;
    }
    let node = Node::new().await;
    fs::write(node.config.cni_conf_dir.join("10-test.conflist"), "not json").unwrap();
    for _ in 0..20 {
        assert!(matches!(node.runtime().run_sandbox(node.pod()).await, Err(Error::Network(_))));
        assert_eq!(node.inits(), [""; 0], "processes are left");
    }
    node.finish().await;
}

#[tokio::test]
async fn a_failed_del_is_repeated() {
    if !require("a_failed_del_is_repeated", &["root"]) {
        return;
    }
    let mut node = Node::new().await;
    let id = node.sandbox().await;
    node.plugin("#!/bin/sh\nexit 1\n");
    assert!(matches!(node.runtime().stop_sandbox(&id).await, Err(Error::Network(_))));
    node.restart().await;
    assert_eq!(node.runtime().list_sandboxes().await.unwrap().len(), 1);
    assert!(node.runtime().remove_sandbox(&id).await.is_err());
    node.plugin(NOOP_PLUGIN);
    node.runtime().remove_sandbox(&id).await.unwrap();
    assert!(calls(&node).iter().any(|call| call.starts_with("DEL")));
    node.finish().await;
}

/// The bridge is made where the runtime runs: here, in a network namespace of this thread and all that it starts.
#[test]
fn the_reference_plugins_connect_pods() {
    if !require("the_reference_plugins_connect_pods", &["root", "ip"]) {
        return;
    }
    let plugins = ["/usr/lib/cni", "/opt/cni/bin"].map(Path::new);
    let Some(plugins) = plugins.into_iter().find(|folder| folder.join("bridge").exists()) else {
        require("the_reference_plugins_connect_pods", &["reference-cni-plugins"]);
        return;
    };
    let test = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(two_pods(plugins));
    };
    std::thread::spawn(test).join().unwrap();
}

async fn two_pods(plugins: &Path) {
    let mut node = Node::new().await;
    node.config.cni_bin_dirs = vec![plugins.to_path_buf()];
    let leases = node.folder.path().join("leases");
    node.network(&json!({"cniVersion": "1.0.0", "name": "ref", "plugins": [
        {"type": "bridge", "bridge": "ref0", "isGateway": true,
         "ipam": {"type": "host-local", "subnet": "10.99.0.0/24", "dataDir": leases}},
        {"type": "tuning"}]}));
    node.restart().await;
    let one = node.runtime().run_sandbox(node.pod()).await.unwrap();
    let two = node.runtime().run_sandbox(node.pod()).await.unwrap();
    assert_eq!(one.ips[0].to_string(), "10.99.0.2");
    let id = node.start(&two.id, script("c", "exec sleep 1000")).await;
    let (code, output) = node.exec(&id, &["ping", "-c1", "-W5", "10.99.0.2"]).await;
    assert_eq!(code, 0, "{output}");
    // DEL works when the init is gone: the namespace is pinned.
    let pid = node.runtime().sandbox_pid(&one.id).await.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    node.runtime().remove_sandbox(&one.id).await.unwrap();
    node.runtime().remove_sandbox(&two.id).await.unwrap();
    let left = fs::read_dir(leases.join("ref"))
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("10."))
        .count();
    assert_eq!(left, 0);
    node.finish().await;
}
