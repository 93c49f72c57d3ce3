//! Clusters of both address families and of IPv6 alone, on two nodes: addresses, pods on one node and across, names, egress.

use std::time::Duration;

use anyhow::Context as _;
use weft_tests_e2e::{NEEDS, eventually, image_archive, seen_outside, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::ip;
use weft_tests_harness::{require, wait_until};

/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// The families of a cluster, and what follows from them.
struct Families {
    cluster: &'static str,
    services: &'static str,
    /// The nodes' ranges, whichever node has which.
    ranges: [&'static str; 2],
    /// The nodes' own addresses.
    nodes: [&'static str; 2],
    /// What the addresses of a pod begin with, in their order.
    pods: &'static [&'static str],
    /// The machine's addresses on the network between the nodes.
    machine: &'static [&'static str],
}

const BOTH: Families = Families {
    cluster: "10.42.0.0/16,fd42::/56",
    services: "10.43.0.0/16,fd43::/112",
    ranges: [
        "10.42.0.0/24 [\"10.42.0.0/24\",\"fd42::/64\"]",
        "10.42.1.0/24 [\"10.42.1.0/24\",\"fd42:0:0:1::/64\"]",
    ],
    nodes: ["10.44.0.2 fd44::2", "10.44.0.3 fd44::3"],
    pods: &["10.42.", "fd42:"],
    machine: &["10.44.0.1", "fd44::1"],
};

const SIX_FIRST: Families = Families {
    cluster: "fd42::/56,10.42.0.0/16",
    services: "fd43::/112,10.43.0.0/16",
    ranges: [
        "fd42:0:0:1::/64 [\"fd42:0:0:1::/64\",\"10.42.1.0/24\"]",
        "fd42::/64 [\"fd42::/64\",\"10.42.0.0/24\"]",
    ],
    nodes: ["fd44::2 10.44.0.2", "fd44::3 10.44.0.3"],
    pods: &["fd42:", "10.42."],
    machine: &["fd44::1", "10.44.0.1"],
};

/// Tunnels are of IPv6 too, and so is the way to the API.
const SIX: Families = Families {
    cluster: "fd42::/56",
    services: "fd43::/112",
    ranges: ["fd42:0:0:1::/64 [\"fd42:0:0:1::/64\"]", "fd42::/64 [\"fd42::/64\"]"],
    nodes: ["fd44::2", "fd44::3"],
    pods: &["fd42:"],
    machine: &["fd44::1"],
};

impl Families {
    fn start(&self, test: &str, label: &str) -> anyhow::Result<Option<Cluster>> {
        self.start_with(test, label, &[])
    }

    fn start_with(&self, test: &str, label: &str, more: &[&str]) -> anyhow::Result<Option<Cluster>> {
        let flags = ["--nodes", "2", "--cluster-cidr", self.cluster, "--service-cidr", self.services];
        let flags = [&flags, more].concat();
        if !require(test, NEEDS) {
            return Ok(None);
        }
        let cluster = Cluster::start(label, &flags)?;
        cluster.import(&image_archive("busybox")?)?;
        Ok(Some(cluster))
    }
}

/// A server on each node that says its own name, at port 80 of both families, and a headless Service over both.
fn servers() -> String {
    let mut manifests = vec![
        "apiVersion: v1
kind: Service
metadata: {name: pair}
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{name: http, port: 80}]
"
        .to_owned(),
    ];
    for number in 1..=2 {
        manifests.push(format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: web-{number}, labels: {{app: web}}}}
spec:
  nodeName: node-{number}
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'mkdir /www && hostname > /www/hostname && exec httpd -f -p \"[::]:80\" -h /www']
    readinessProbe: {{httpGet: {{path: /hostname, port: 80}}, periodSeconds: 1}}
"
        ));
        manifests.push(sleeper(&format!("client-{number}"), Some(&format!("node-{number}"))));
    }
    manifests.join("---\n")
}

#[test]
fn two_nodes_of_both_families() -> anyhow::Result<()> {
    let Some(mut cluster) = BOTH.start("dual::two_nodes_of_both_families", "dual")? else { return Ok(()) };
    all_of(&cluster, &BOTH)?;
    the_ranges_are_kept_over_a_restart(&mut cluster)?;
    cluster.purge()
}

#[test]
fn two_nodes_with_ipv6_first() -> anyhow::Result<()> {
    let Some(mut cluster) = SIX_FIRST.start("dual::two_nodes_with_ipv6_first", "sixone")? else {
        return Ok(());
    };
    all_of(&cluster, &SIX_FIRST)?;
    cluster.purge()
}

#[test]
fn two_nodes_of_ipv6_alone() -> anyhow::Result<()> {
    let Some(mut cluster) = SIX.start("dual::two_nodes_of_ipv6_alone", "six")? else { return Ok(()) };
    all_of(&cluster, &SIX)?;
    cluster.purge()
}

/// The nodes of one machine are on one link, which takes pods' packets.
#[test]
fn two_nodes_that_find_their_link() -> anyhow::Result<()> {
    by_link("dual::two_nodes_that_find_their_link", "auto", "1450")
}

#[test]
fn two_nodes_that_are_told_of_their_link() -> anyhow::Result<()> {
    by_link("dual::two_nodes_that_are_told_of_their_link", "native", "1500")
}

fn by_link(test: &str, routing: &str, mtu: &str) -> anyhow::Result<()> {
    let Some(mut cluster) = BOTH.start_with(test, "link", &["--routing", routing])? else { return Ok(()) };
    let mut says = String::new();
    let waited = wait_until("both ranges of either node by the link", PATIENCE, || {
        says = String::from_utf8_lossy(&cluster.weft()?.arg("doctor").output()?.stdout).into_owned();
        let by_link = says.matches("2 ranges of pods on other nodes are reached over their link").count();
        Ok((by_link == 2 && !says.contains("reached by tunnels")).then_some(()))
    });
    waited.with_context(|| format!("the doctor said last:\n{says}"))?;
    all_of(&cluster, &BOTH)?;
    let of_pod = cluster.kubectl(&["exec", "client-1", "--", "cat", "/sys/class/net/eth0/mtu"])?;
    assert_eq!(of_pod.trim(), mtu);
    cluster.purge()
}

fn all_of(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    nodes_have_ranges_and_addresses(cluster, families)?;
    cluster.apply(&servers())?;
    let wait = ["wait", "--for=condition=Ready", "--timeout=60s"];
    cluster.kubectl(&[&wait[..], &["pod/web-1", "pod/web-2", "pod/client-1", "pod/client-2"]].concat())?;
    every_pod_reaches_every_other(cluster, families)?;
    a_pod_knows_its_addresses(cluster, families)?;
    names_have_records_of_each_family(cluster, families)?;
    a_service_answers_at_each_address(cluster, families)?;
    egress_bears_the_nodes_address(cluster, families)
}

/// The lines of a list by jsonpath.
fn list(cluster: &Cluster, kind: &str, path: &str) -> anyhow::Result<Vec<String>> {
    let columns = format!("jsonpath={{range .items[*]}}{path}{{\"\\n\"}}{{end}}");
    let said = cluster.kubectl(&["get", kind, "-o", &columns])?;
    Ok(said.lines().map(str::to_owned).collect())
}

fn nodes_have_ranges_and_addresses(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    let mut ranges = list(cluster, "nodes", "{.spec.podCIDR} {.spec.podCIDRs}")?;
    ranges.sort();
    assert_eq!(ranges, families.ranges);
    let internal = "{.status.addresses[?(@.type==\"InternalIP\")].address}";
    assert_eq!(list(cluster, "nodes", internal)?, families.nodes);
    Ok(())
}

/// Name and addresses of the pods whose name begins so.
fn pods(cluster: &Cluster, families: &Families, label: &str) -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let mut found = Vec::new();
    for line in list(cluster, "pods", "{.metadata.name} {.status.podIP} {.status.podIPs[*].ip}")? {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, first, all @ ..] = &words[..] else { anyhow::bail!("{line:?} lacks addresses") };
        assert_eq!(Some(first), all.first(), "the primary family's comes first: {line}");
        assert_eq!(all.len(), families.pods.len(), "{line}");
        assert!(all.iter().zip(families.pods).all(|(ip, network)| ip.starts_with(network)), "{line}");
        if name.starts_with(label) {
            found.push(((*name).to_owned(), all.iter().map(|ip| (*ip).to_owned()).collect()));
        }
    }
    Ok(found)
}

fn fetch(cluster: &Cluster, from: &str, host: &str) -> anyhow::Result<String> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let url = format!("http://{host}/hostname");
    let answer = cluster.kubectl(&["exec", from, "--", "wget", "-qO-", &url]);
    Ok(answer.with_context(|| format!("{from} to {url}"))?.trim().to_owned())
}

/// On one node and across, in both families; a megabyte too, so that packets of full size pass the tunnel.
fn every_pod_reaches_every_other(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    let servers = pods(cluster, families, "web-")?;
    assert_eq!(servers.len(), 2);
    for (server, addresses) in &servers {
        let big = "head -c 1048576 /dev/zero > /www/big";
        cluster.kubectl(&["exec", server, "--", "sh", "-c", big])?;
        for (from, address) in
            ["client-1", "client-2"].into_iter().flat_map(|from| addresses.iter().map(move |a| (from, a)))
        {
            assert_eq!(fetch(cluster, from, address)?, *server, "{from} to {address}");
            let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
            let count = format!("wget -qO- 'http://{host}/big' | wc -c");
            assert_eq!(cluster.kubectl(&["exec", from, "--", "sh", "-c", &count])?.trim(), "1048576");
        }
    }
    Ok(())
}

const CURIOUS: &str = "apiVersion: v1
kind: Pod
metadata: {name: curious}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    command: [sleep, '100000']
    env:
    - {name: POD_IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
    - {name: HOST_IPS, valueFrom: {fieldRef: {fieldPath: status.hostIPs}}}
";

fn a_pod_knows_its_addresses(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    cluster.apply(CURIOUS)?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/curious"])?;
    let [(_, ips)] = &pods(cluster, families, "curious")?[..] else { anyhow::bail!("one pod") };
    let variable = |name: &str| {
        let script = format!("echo ${name}");
        Ok::<_, anyhow::Error>(
            cluster.kubectl(&["exec", "curious", "--", "sh", "-c", &script])?.trim().to_owned(),
        )
    };
    assert_eq!(variable("POD_IPS")?, ips.join(","));
    let hosts = cluster.kubectl(&["get", "pod", "curious", "-o", "jsonpath={.status.hostIPs[*].ip}"])?;
    assert_eq!(variable("HOST_IPS")?, hosts.replace(' ', ","));
    assert!(families.nodes.contains(&hosts.as_str()), "{hosts}");
    let file = cluster.kubectl(&["exec", "curious", "--", "cat", "/etc/hosts"])?;
    for ip in ips {
        assert!(file.contains(&format!("{ip}\tcurious\n")), "{file}");
    }
    Ok(())
}

fn names_have_records_of_each_family(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    let servers = pods(cluster, families, "web-")?;
    for (kind, v6) in [("a", false), ("aaaa", true)] {
        let of_kind = |ip: &&String| ip.contains(':') == v6;
        let wanted: Vec<_> = servers.iter().flat_map(|(_, ips)| ips).filter(of_kind).collect();
        let kind = format!("-type={kind}");
        let name = "pair.default.svc.cluster.local";
        let args = ["exec", "client-1", "--", "nslookup", &kind, name];
        let said = eventually(cluster, &args, |said| said.matches("Name:").count() == wanted.len())?;
        assert!(wanted.iter().all(|ip| said.contains(*ip)), "{wanted:?}: {said}");
    }
    Ok(())
}

/// From pods on either node, and at the nodes' ports from outside.
fn a_service_answers_at_each_address(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    cluster.apply(
        "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
",
    )?;
    let addresses = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"])?;
    let addresses: Vec<&str> = addresses.split(' ').collect();
    assert_eq!(addresses.len(), families.pods.len(), "{addresses:?}");
    for address in &addresses {
        for from in ["client-1", "client-2"] {
            let host = if address.contains(':') { format!("[{address}]") } else { (*address).to_owned() };
            let url = format!("http://{host}/hostname");
            // At once where the maps have it; a client may come before them.
            eventually(cluster, &["exec", from, "--", "wget", "-qO-", &url], |name| {
                name.starts_with("web-")
            })?;
        }
    }
    for node in families.nodes.iter().flat_map(|node| node.split(' ')) {
        let answer = ask(cluster, std::net::SocketAddr::new(node.parse()?, 30080));
        let answer = answer.with_context(|| format!("the node's port at {node}"))?;
        assert!(answer.contains("web-"), "{node}: {answer}");
    }
    Ok(())
}

/// Asks a server for its name, from the machine that the nodes are on.
fn ask(cluster: &Cluster, server: std::net::SocketAddr) -> anyhow::Result<String> {
    use std::io::{Read as _, Write as _};
    let asked = cluster.netns.thread(move || {
        let patience = std::time::Duration::from_secs(5);
        let mut stream = std::net::TcpStream::connect_timeout(&server, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    asked.join().map_err(|_panic| anyhow::anyhow!("the client broke down"))?
}

/// To the machine that the nodes are on.
fn egress_bears_the_nodes_address(cluster: &Cluster, families: &Families) -> anyhow::Result<()> {
    for (listen, node) in families.machine.iter().zip(families.nodes[1].split(' ')) {
        assert_eq!(seen_outside(cluster, "client-2", listen.parse()?)?.to_string(), node);
    }
    Ok(())
}

/// A node that is the machine has the machine's own addresses, and of a family that it lacks one of weft's.
#[test]
fn a_single_node_takes_the_machines_own_addresses() -> anyhow::Result<()> {
    if !require("dual::a_single_node_takes_the_machines_own_addresses", NEEDS) {
        return Ok(());
    }
    let ranges = ["--cluster-cidr", BOTH.cluster, "--service-cidr", BOTH.services];
    for (own, expected) in [
        (&["192.0.2.10/24", "2001:db8::10/64"][..], "192.0.2.10 2001:db8::10"),
        (&["192.0.2.10/24"][..], "192.0.2.10 fd44::1"),
    ] {
        let mut cluster = Cluster::unstarted("one", &ranges)?;
        let machine = cluster.netns.name().to_owned();
        let run =
            |command: &str| ip(&["-n", &machine].into_iter().chain(command.split(' ')).collect::<Vec<_>>());
        run("link add up0 type veth peer name up1")?;
        run("link set up1 up")?;
        run("link set up0 up")?;
        for address in own {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            run(&format!("addr add {address} dev up0{nodad}"))?;
        }
        cluster.up()?;
        cluster.import(&image_archive("busybox")?)?;
        let internal = "{.status.addresses[?(@.type==\"InternalIP\")].address}";
        assert_eq!(list(&cluster, "nodes", internal)?, [expected]);
        cluster.apply(CURIOUS)?;
        cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/curious"])?;
        for node in expected.split(' ') {
            let ping = ["exec", "curious", "--", "ping", "-c1", "-W5", node];
            cluster.kubectl(&ping).with_context(|| format!("from the pod to its node at {node}"))?;
        }
        cluster.purge()?;
    }
    Ok(())
}

/// The same record, asked for or not; another range is refused.
fn the_ranges_are_kept_over_a_restart(cluster: &mut Cluster) -> anyhow::Result<()> {
    let before = std::fs::read_to_string(cluster.data_dir().join("cluster.json"))?;
    let output = cluster.weft()?.args(["down"]).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    if let Some(process) = cluster.process() {
        process.wait()?;
    }
    let other = cluster.weft()?.args(["up", "--cluster-cidr", "10.42.0.0/16"]).output()?;
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("fd42::/56, not 10.42.0.0/16"), "{said}");
    cluster.up()?;
    assert_eq!(std::fs::read_to_string(cluster.data_dir().join("cluster.json"))?, before);
    nodes_have_ranges_and_addresses(cluster, &BOTH)
}

#[test]
fn wrong_ranges_are_refused_before_anything_is_made() -> anyhow::Result<()> {
    if !require("dual::wrong_ranges", NEEDS) {
        return Ok(());
    }
    let cluster = Cluster::unstarted("dualbad", &[])?;
    for (flags, expected) in [
        (&["--cluster-cidr", "10.42.0.0/16,10.44.0.0/16"][..], "same address family"),
        (&["--cluster-cidr", "10.42.0.0/16", "--service-cidr", "fd43::/112"], "primary family"),
        (&["--cluster-cidr", "10.42.0.0/16", "--service-cidr", "10.42.4.0/24"], "overlap"),
        (&["--nodes", "3", "--cluster-cidr", "10.42.0.0/23"], "room for 2 nodes"),
    ] {
        let output = cluster.weft()?.arg("up").args(flags).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{flags:?}: {said}");
    }
    assert_eq!(std::fs::read_dir(cluster.data_dir())?.count(), 0, "nothing is made");
    Ok(())
}
