//! A list of plugins, called as libcni calls them (CNI 1.1.0 §3): the result handed on, kept, and given to CHECK and DEL; capabilities
//! to those that name them; DEL in reverse; GC and STATUS for each.

use std::net::TcpListener;

use serde_json::{Map, Value, json};
use weft_cni_netlink::namespace;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::calls::{self, Node, addresses_of, conf};
use crate::pod;

/// A network's list, and what its last ADD answered.
struct List<'a> {
    node: &'a Node,
    version: &'static str,
    plugins: Vec<Value>,
    capabilities: Value,
    cached: Option<Value>,
}

impl List<'_> {
    fn input(&self, plugin: &Value, previous: Option<&Value>) -> Value {
        let mut input = plugin.clone();
        (input["cniVersion"], input["name"]) = (json!(self.version), json!("weft"));
        let named = plugin["capabilities"].as_object().cloned().unwrap_or_default();
        let given = self.capabilities.as_object().unwrap().iter();
        let given: Map<String, Value> = given
            .filter(|(name, _)| named.get(*name) == Some(&json!(true)))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !given.is_empty() {
            input["runtimeConfig"] = Value::Object(given);
        }
        if let Some(previous) = previous {
            input["prevResult"] = previous.clone();
        }
        input
    }

    fn run(&self, verb: &str, plugin: &Value, pod: Option<&Netns>, input: &Value) -> Value {
        let id = if pod.is_some() { "a" } else { "" };
        match plugin["type"].as_str().unwrap() {
            "weft-cni" => self.node.ok(verb, id, pod, input),
            reference => self.node.ok_of(&format!("/usr/lib/cni/{reference}"), verb, id, pod, input),
        }
    }

    fn add(&mut self, pod: &Netns) -> Value {
        let mut result = None;
        for plugin in &self.plugins {
            let input = self.input(plugin, result.as_ref());
            result = Some(self.run("ADD", plugin, Some(pod), &input));
        }
        self.cached = result;
        self.cached.clone().unwrap()
    }

    fn check(&self, pod: &Netns) {
        for plugin in &self.plugins {
            self.run("CHECK", plugin, Some(pod), &self.input(plugin, self.cached.as_ref()));
        }
    }

    fn del(&self, pod: &Netns) {
        for plugin in self.plugins.iter().rev() {
            self.run("DEL", plugin, Some(pod), &self.input(plugin, self.cached.as_ref()));
        }
    }

    /// GC with nothing valid, then STATUS.
    fn collect(&self) {
        for plugin in &self.plugins {
            let mut input = self.input(plugin, None);
            input["cni.dev/valid-attachments"] = json!([]);
            self.run("GC", plugin, None, &input);
            self.run("STATUS", plugin, None, &self.input(plugin, None));
        }
    }
}

fn first(node: &Node, capabilities: Value) -> Value {
    let mut plugin = conf(node);
    plugin["capabilities"] = capabilities;
    plugin
}

fn ports() -> Value {
    json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "ips": ["10.42.1.50/24"],
        "mac": "02:00:00:00:00:50",
        "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 800_000},
    })
}

/// What the reference plugins make of our result, in each version that they speak.
#[test]
fn reference_plugins_come_behind_it() {
    if !require("cni::chain", &["root", "ip", "/usr/lib/cni/tuning"]) {
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let (node, a) = (Node::new(), pod());
        node.warm_up();
        let before = node.state();
        let tuning = json!({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}});
        let mut list = List {
            node: &node,
            version,
            plugins: vec![first(&node, json!({"ips": true, "portMappings": true})), tuning],
            capabilities: ports(),
            cached: None,
        };
        let result = list.add(&a);
        assert_eq!(
            (&result["cniVersion"], addresses_of(&result).as_slice()),
            (&json!(version), &["10.42.1.50".to_owned()][..])
        );
        assert_eq!(calls::sysctl(&a, "ipv4/conf/eth0/arp_filter"), "1");
        calls::connect(&a, &node.netns, "10.42.1.1");
        if version >= "0.4.0" {
            list.check(&a);
        }
        list.del(&a);
        assert_eq!((node.leases(), node.state()), (0, before), "{version}");
    }
}

/// Those that most lists have behind the one that attaches: they find the host's end, and the address that host ports lead to, in our
/// result.
#[test]
fn portmap_and_bandwidth_come_behind_it() {
    let reference = ["/usr/lib/cni/portmap", "/usr/lib/cni/bandwidth"];
    if !require("cni::chain_portmap", &["root", "ip", "tc", "iptables", reference[0], reference[1]]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    node.warm_up();
    let before = node.state();
    let named = |plugin: &str, capability: &str| json!({"type": plugin, "capabilities": {capability: true}});
    let mut list = List {
        node: &node,
        version: "1.0.0",
        plugins: vec![
            first(&node, json!({"ips": true})),
            named("portmap", "portMappings"),
            named("bandwidth", "bandwidth"),
        ],
        capabilities: ports(),
        cached: None,
    };
    let result = list.add(&a);
    assert_eq!(addresses_of(&result), ["10.42.1.50"]);
    let port = result["interfaces"][1]["name"].as_str().unwrap();
    let shown = node.netns.command("tc").unwrap().args(["qdisc", "show", "dev", port]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("tbf") && shown.contains("rate 8Mbit"), "{shown}");
    // From the node itself, by the address of its bridge.
    let listener = namespace::within(&a.path(), || TcpListener::bind("10.42.1.50:80").unwrap()).unwrap();
    assert!(calls::reaches(&node.netns, "10.42.1.1:8080"));
    assert!(!calls::reaches(&node.netns, "10.42.1.1:8081"));
    drop(listener);
    // Not CHECK: this portmap looks for rules of IPv6, whether the pod has such an address or not.
    list.del(&a);
    assert!(!calls::reaches(&node.netns, "10.42.1.1:8080"));
    assert_eq!((node.leases(), node.state()), (0, before));
}

/// The plugin twice: once to attach, once for the capabilities, as a list of somebody else's may have it.
#[test]
fn a_list_lives_through_every_verb() {
    if !require("cni::list", &["root", "ip", "nft"]) {
        return;
    }
    let (node, a) = (Node::new(), pod());
    node.warm_up();
    let before = node.state();
    let behind = json!({
        "type": "weft-cni", "stateDir": node.folder().join("behind"),
        "capabilities": {"portMappings": true, "bandwidth": true},
    });
    let mut list = List {
        node: &node,
        version: "1.1.0",
        plugins: vec![first(&node, json!({"ips": true, "mac": true})), behind],
        capabilities: ports(),
        cached: None,
    };
    list.collect();
    let result = list.add(&a);
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:50");
    assert_eq!(node.mapped().len(), 2, "{:?}", node.mapped());
    list.check(&a);
    list.del(&a);
    list.del(&a);
    assert_eq!((node.leases(), node.state()), (0, before.clone()));
    // A caller that has lost its records.
    list.add(&a);
    list.collect();
    assert_eq!((node.leases(), node.state()), (0, before));
}
