//! A cluster of both address families on two nodes: addresses, pods on one node and across, names, egress.

use anyhow::Context as _;
use weft_tests_e2e::{cluster, eventually, sleeper};
use weft_tests_harness::cluster::Cluster;

const FLAGS: [&str; 6] =
    ["--nodes", "2", "--cluster-cidr", "10.42.0.0/16,fd42::/56", "--service-cidr", "10.43.0.0/16,fd43::/112"];

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
    let Some(mut cluster) = cluster("dual::two_nodes_of_both_families", "dual", &FLAGS)? else {
        return Ok(());
    };
    nodes_have_ranges_and_addresses(&cluster)?;
    cluster.apply(&servers())?;
    let wait = ["wait", "--for=condition=Ready", "--timeout=60s"];
    cluster.kubectl(&[&wait[..], &["pod/web-1", "pod/web-2", "pod/client-1", "pod/client-2"]].concat())?;
    every_pod_reaches_every_other(&cluster)?;
    a_pod_knows_its_addresses(&cluster)?;
    egress_bears_the_nodes_address(&cluster)?;
    the_ranges_are_kept_over_a_restart(&mut cluster)?;
    names_have_both_kinds_of_records(&cluster)?;
    cluster.purge()
}

/// The lines of a list by jsonpath.
fn list(cluster: &Cluster, kind: &str, path: &str) -> anyhow::Result<Vec<String>> {
    let columns = format!("jsonpath={{range .items[*]}}{path}{{\"\\n\"}}{{end}}");
    let said = cluster.kubectl(&["get", kind, "-o", &columns])?;
    Ok(said.lines().map(str::to_owned).collect())
}

fn nodes_have_ranges_and_addresses(cluster: &Cluster) -> anyhow::Result<()> {
    let mut ranges = list(cluster, "nodes", "{.spec.podCIDR} {.spec.podCIDRs}")?;
    ranges.sort();
    let of = |number: u8, six: &str| format!("10.42.{number}.0/24 [\"10.42.{number}.0/24\",\"{six}\"]");
    assert_eq!(ranges, [of(0, "fd42::/64"), of(1, "fd42:0:0:1::/64")]);
    let internal = "{.metadata.name} {.status.addresses[?(@.type==\"InternalIP\")].address}";
    assert_eq!(list(cluster, "nodes", internal)?, ["node-1 10.44.0.2 fd44::2", "node-2 10.44.0.3 fd44::3"]);
    Ok(())
}

/// Name and both addresses of a pod.
fn pods(cluster: &Cluster, label: &str) -> anyhow::Result<Vec<(String, [String; 2])>> {
    let mut found = Vec::new();
    for line in list(cluster, "pods", "{.metadata.name} {.status.podIP} {.status.podIPs[*].ip}")? {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, first, four, six] = words[..] else { anyhow::bail!("{line:?} is not of two addresses") };
        assert_eq!(first, four, "the primary family's comes first: {line}");
        assert!(four.starts_with("10.42.") && six.starts_with("fd42:"), "{line}");
        if name.starts_with(label) {
            found.push((name.to_owned(), [four.to_owned(), six.to_owned()]));
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
fn every_pod_reaches_every_other(cluster: &Cluster) -> anyhow::Result<()> {
    let servers = pods(cluster, "web-")?;
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

fn a_pod_knows_its_addresses(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(CURIOUS)?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/curious"])?;
    let [(_, ips)] = &pods(cluster, "curious")?[..] else { anyhow::bail!("one pod") };
    let variable = |name: &str| {
        let script = format!("echo ${name}");
        Ok::<_, anyhow::Error>(
            cluster.kubectl(&["exec", "curious", "--", "sh", "-c", &script])?.trim().to_owned(),
        )
    };
    assert_eq!(variable("POD_IPS")?, ips.join(","));
    let hosts = cluster.kubectl(&["get", "pod", "curious", "-o", "jsonpath={.status.hostIPs[*].ip}"])?;
    assert_eq!(variable("HOST_IPS")?, hosts.replace(' ', ","));
    assert!(hosts.starts_with("10.44.0.") && hosts.contains(" fd44::"), "{hosts}");
    let file = cluster.kubectl(&["exec", "curious", "--", "cat", "/etc/hosts"])?;
    for ip in ips {
        assert!(file.contains(&format!("{ip}\tcurious\n")), "{file}");
    }
    Ok(())
}

fn names_have_both_kinds_of_records(cluster: &Cluster) -> anyhow::Result<()> {
    let servers = pods(cluster, "web-")?;
    let name = "pair.default.svc.cluster.local";
    let asked = |kind: &str| {
        let kind = format!("-type={kind}");
        let args = ["exec", "client-1", "--", "nslookup", &kind, name];
        eventually(cluster, &args, |said| said.matches("Name:").count() == 2)
    };
    let (four, six) = (asked("a")?, asked("aaaa")?);
    for (_, [v4, v6]) in &servers {
        assert!(four.contains(v4) && !four.contains(v6), "{four}");
        assert!(six.contains(v6) && !six.contains(v4), "{six}");
    }
    Ok(())
}

/// To the machine that the nodes are on, which knows no way back to a pod.
fn egress_bears_the_nodes_address(cluster: &Cluster) -> anyhow::Result<()> {
    use std::io::{BufRead as _, BufReader, Write as _};
    for (listen, node) in [("10.44.0.1", "10.44.0.3"), ("fd44::1", "fd44::3")] {
        let address: std::net::IpAddr = listen.parse()?;
        let (tell, port) = std::sync::mpsc::channel();
        let outside = cluster.netns.thread(move || {
            let listener = std::net::TcpListener::bind((address, 0))?;
            tell.send(listener.local_addr()?.port())?;
            let (mut stream, from) = listener.accept()?;
            // Whole, or the kernel would answer the rest with a reset.
            let mut request = BufReader::new(&stream).lines();
            while request.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom outside\n")?;
            Ok(from.ip())
        })?;
        let host = if address.is_ipv6() { format!("[{listen}]") } else { listen.to_owned() };
        let url = format!("http://{host}:{}/", port.recv()?);
        let said = cluster.kubectl(&["exec", "client-2", "--", "wget", "-qO-", &url])?;
        assert_eq!(said.trim(), "from outside");
        let from = outside.join().map_err(|_| anyhow::anyhow!("the server outside broke down"))??;
        assert_eq!(from.to_string(), node);
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
    nodes_have_ranges_and_addresses(cluster)
}

#[test]
fn wrong_ranges_are_refused_before_anything_is_made() -> anyhow::Result<()> {
    if !weft_tests_harness::require("dual::wrong_ranges", weft_tests_e2e::NEEDS) {
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
