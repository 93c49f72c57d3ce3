//! Upstream's own caller: `cnitool`, on configurations as they are written for bridge and host-local.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use super::calls::{self, Node, addresses_of};

/// Folders for cnitool: the plugin, the network's configuration, and what libcni keeps below `/var/lib`.
struct Tool<'n> {
    node: &'n Node,
    folder: tempfile::TempDir,
}

impl<'n> Tool<'n> {
    fn new(node: &'n Node, list: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["bin", "conf", "lib"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        fs::copy(&node.program, folder.path().join("bin/weft-cni")).unwrap();
        fs::write(folder.path().join("conf/10-weft.conflist"), list.to_string()).unwrap();
        Self { node, folder }
    }

    fn run(&self, verb: &str, pod: &Netns, capabilities: &Value) -> Output {
        let at = |name: &str| self.folder.path().join(name);
        let script = "mount --make-rprivate / && mount --bind \"$0\" /var/lib && exec cnitool \"$@\"";
        let mut command = self.node.netns.command("unshare").unwrap();
        command.args(["--mount", "sh", "-c", script]).arg(at("lib")).args([verb, "weft"]);
        command.arg(Path::new("/run/netns").join(pod.name()));
        command.env("CNI_PATH", at("bin")).env("NETCONFPATH", at("conf"));
        command.env("CAP_ARGS", capabilities.to_string()).output().unwrap()
    }

    fn ok(&self, verb: &str, pod: &Netns) -> String {
        let output = self.run(verb, pod, &json!({}));
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn cnitool_attaches_checks_collects_and_detaches() {
    if !require("cni::cnitool", &["root", "ip", "unshare", "cnitool"]) {
        return;
    }
    let node = Node::new();
    let mut plugin = calls::conf(&node);
    plugin["ipam"] = json!({"type": "host-local", "ranges": [[{"subnet": "10.42.1.0/24"}], [{"subnet": "fd00:42:0:1::/64"}]]});
    plugin["capabilities"] = json!({"portMappings": true});
    let tool = Tool::new(&node, &json!({"cniVersion": "1.1.0", "name": "weft", "plugins": [plugin]}));
    let (a, b) = (Netns::new("pod").unwrap(), Netns::new("pod").unwrap());
    tool.ok("status", &a);
    let added: Value = serde_json::from_str(&tool.ok("add", &a)).unwrap();
    assert_eq!(addresses_of(&added), ["10.42.1.2", "fd00:42:0:1::2"]);
    tool.ok("check", &a);
    calls::connect(&a, &node.netns, "10.42.1.1");
    let ports = json!({"portMappings": [{"hostPort": 8088, "containerPort": 80, "protocol": "tcp"}]});
    let output = tool.run("add", &b, &ports);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let again = tool.run("add", &a, &json!({}));
    assert!(!again.status.success(), "a second time");
    tool.ok("del", &a);
    tool.ok("del", &a);
    assert_eq!((node.leases(), calls::links(&a).contains("eth0")), (2, false));
    tool.ok("gc", &b);
    assert_eq!((node.leases(), calls::links(&b).contains("eth0")), (0, false));
}
