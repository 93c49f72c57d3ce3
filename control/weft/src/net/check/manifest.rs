//! The objects of a check: a namespace, a server and a client on every node, a Service for each server and one for all. Pure.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::ResourceExt as _;
use serde_json::json;

use super::results::Outcome;

/// Where the servers listen, and their Services.
pub(super) const PORT: u16 = 8080;
/// Name of the Service of all servers.
pub(super) const ALL: &str = "all";
/// Seconds that one request may take.
const SECONDS: u32 = 5;
/// A body that fills many packets of whatever size: what is lost of large ones only shows with it.
const BODY_BYTES: u32 = 262_144;
/// How often a server asks itself before it gives up: its Service follows a moment after it is Ready.
const HAIRPIN_TRIES: u32 = 20;

/// Where a pod runs.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) namespace: &'a str,
    pub(super) image: &'a str,
    pub(super) node: &'a Node,
    pub(super) index: usize,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// `pod`, `body`, `service`, `nodeport` or `dns`.
    pub(super) check: &'static str,
    /// In words.
    pub(super) to: String,
    /// Where the request goes; a name has none.
    pub(super) address: Option<SocketAddr>,
    /// What a shell runs to ask.
    pub(super) command: String,
    /// What must be in the answer.
    pub(super) wanted: String,
}

impl Target {
    fn fetch(check: &'static str, to: String, address: SocketAddr, wanted: String) -> Self {
        let command = format!("wget -qO- http://{address}/hostname");
        Self { check, to, address: Some(address), command, wanted }
    }

    pub(super) fn pod(node: &str, address: SocketAddr, server: &str) -> Self {
        Self::fetch("pod", format!("pod on {node}"), address, server.to_owned())
    }

    /// Asked by pods only.
    pub(super) fn body(node: &str, address: SocketAddr) -> Self {
        Self {
            check: "body",
            to: format!("pod on {node}, {} KiB", BODY_BYTES / 1_024),
            address: None,
            command: format!("sh -c 'wget -qO- http://{address}/body | wc -c'"),
            wanted: BODY_BYTES.to_string(),
        }
    }

    pub(super) fn service(node: &str, address: SocketAddr, server: &str) -> Self {
        Self::fetch("service", format!("Service of the pod on {node}"), address, server.to_owned())
    }

    pub(super) fn node_port(node: &str, address: SocketAddr) -> Self {
        Self::fetch(
            "nodeport",
            format!("port {} of {node}", address.port()),
            address,
            server_name(0)[..6].to_owned(),
        )
    }

    pub(super) fn name(name: &str, address: IpAddr) -> Self {
        Self {
            check: "dns",
            to: name.to_owned(),
            address: None,
            command: format!("nslookup {name}."),
            wanted: address.to_string(),
        }
    }

    /// What an answer or an error comes to.
    pub(super) fn judge(&self, answer: Result<&str, &str>) -> Outcome {
        match answer {
            Ok(answer) if answer.contains(&self.wanted) => Outcome::Ok,
            Ok(answer) => Outcome::Failed(format!("answered {answer:?}, not {:?}", self.wanted)),
            Err(error) if error.trim().is_empty() => Outcome::Failed(format!("no answer in {SECONDS} s")),
            Err(error) => Outcome::Failed(error.trim().to_owned()),
        }
    }
}

pub(super) fn server_name(index: usize) -> String {
    format!("server-{index}")
}

pub(super) fn client_name(index: usize) -> String {
    format!("client-{index}")
}

pub(super) fn namespace(name: &str) -> serde_json::Result<Namespace> {
    serde_json::from_value(json!({"metadata": {"name": name}}))
}

/// The Service of one server, or of all, which has a port on every node too.
pub(super) fn service(name: &str, index: Option<usize>) -> serde_json::Result<Service> {
    let (kind, selector) = match index {
        Some(index) => ("ClusterIP", json!({"server": server_name(index)})),
        None => ("NodePort", json!({"role": "server"})),
    };
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {"type": kind, "selector": selector, "ports": [{"port": PORT, "targetPort": PORT}]},
    }))
}

/// Answers its name, and asks itself by its Service.
pub(super) fn server(place: &Place<'_>, own: IpAddr) -> serde_json::Result<Pod> {
    let name = server_name(place.index);
    let own = SocketAddr::new(own, PORT);
    let script = format!(
        "mkdir -p /tmp/www && echo {name} > /tmp/www/hostname && head -c {BODY_BYTES} /dev/zero > /tmp/www/body && httpd -p {PORT} -h /tmp/www\n\
         i=0\n\
         while [ $i -lt {HAIRPIN_TRIES} ]; do\n\
         r=$(timeout {SECONDS} wget -qO- http://{own}/hostname 2>&1) && break\n\
         i=$((i+1)); sleep 0.25\n\
         done\n\
         echo \"RESULT hairpin $r\"\n\
         exec sleep 1000000"
    );
    let mut pod = pod(place, &name, &script, "Always");
    pod["metadata"]["labels"] = json!({"role": "server", "server": name});
    pod["spec"]["containers"][0]["readinessProbe"] = json!({"tcpSocket": {"port": PORT}, "periodSeconds": 1});
    serde_json::from_value(pod)
}

/// Asks every target once and says in its log what came of each.
pub(super) fn client(place: &Place<'_>, targets: &[Target]) -> serde_json::Result<Pod> {
    let mut script = format!(
        "t() {{ n=$1; shift; if r=$(timeout {SECONDS} \"$@\" 2>&1); then s=ok; else s=fail; fi; \
         echo \"RESULT $n $s\" $r; }}\n"
    );
    for (number, target) in targets.iter().enumerate() {
        script.push_str(&format!("t {number} {}\n", target.command));
    }
    serde_json::from_value(pod(place, &client_name(place.index), &script, "Never"))
}

/// On its node whatever the scheduler thinks of it: the node's network is what is looked at.
fn pod(place: &Place<'_>, name: &str, script: &str, restart: &str) -> serde_json::Value {
    json!({
        "metadata": {"name": name, "namespace": place.namespace},
        "spec": {
            "nodeName": place.node.name_any(),
            "restartPolicy": restart,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "main",
                "image": place.image,
                "imagePullPolicy": "Never",
                "command": ["sh", "-c", script],
            }],
        },
    })
}
