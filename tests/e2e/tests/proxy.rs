//! `weft proxy` on a machine of a cluster that knows nothing of it, taking over from kube-proxy's rules.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::machine::{ACCOUNT, Machine};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually, nginx};
use weft_tests_harness::{require, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
";

/// kube-proxy's shape: a jump, the Service, its only endpoint.
fn kube_proxy_rules(machine: &Machine, service: IpAddr, pod: &str) -> anyhow::Result<()> {
    let (service, pod) = (format!("{service}/32"), format!("{pod}:80"));
    let rules: [&[&str]; 6] = [
        &["-N", "KUBE-SERVICES"],
        &["-N", "KUBE-SVC-WEB"],
        &["-N", "KUBE-KUBELET-CANARY"],
        &["-A", "OUTPUT", "-m", "comment", "--comment", "kubernetes service portals", "-j", "KUBE-SERVICES"],
        &["-A", "KUBE-SERVICES", "-d", &service, "-p", "tcp", "--dport", "80", "-j", "KUBE-SVC-WEB"],
        &["-A", "KUBE-SVC-WEB", "-p", "tcp", "-j", "DNAT", "--to-destination", &pod],
    ];
    for rule in rules {
        machine.run("iptables", &[&["-w", "-t", "nat"], rule].concat())?;
    }
    Ok(())
}

#[test]
fn it_takes_over_from_kube_proxy_and_outlives_its_process() -> anyhow::Result<()> {
    if !require("proxy", &["iptables"]) {
        return Ok(());
    }
    let Some(mut cluster) = cluster("proxy", "prx", &[])? else { return Ok(()) };
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(SERVICE)?;
    cluster.apply(ACCOUNT)?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let service: IpAddr =
        cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?.parse()?;
    let pod =
        cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let machine = Machine::new(&cluster)?;
    machine.write_kubeconfig(&cluster)?;
    kube_proxy_rules(&machine, service, &pod)?;

    let clients = Clients::start(&machine.netns, SocketAddr::new(service, 80), 2, Duration::from_millis(2))?;
    wait_until("kube-proxy's rules serve", PATIENCE, || Ok((clients.answered() > 10).then_some(())))?;
    let log = machine.folder().join("log");
    let mut proxy = machine.start_weft_proxy(&cluster, &log)?;
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let rules = || machine.run("iptables-save", &["-t", "nat"]);
    let taken = wait_until("kube-proxy's rules are gone", PATIENCE, || {
        ensure!(proxy.runs()?, "weft proxy ended");
        Ok((!rules()?.contains("KUBE-S")).then_some(()))
    });
    taken.with_context(said)?;
    assert!(rules()?.contains("KUBE-KUBELET-CANARY"), "the kubelet's stay");
    let answered = clients.answered();
    wait_until("weft serves", PATIENCE, || Ok((clients.answered() > answered + 50).then_some(())))?;

    assert!(machine.get(10_256, "livez")?.contains("lastUpdated"));
    let metrics = machine.get(10_249, "metrics")?;
    assert!(metrics.contains("kubeproxy_sync_proxy_rules_duration_seconds_count"), "{metrics}");

    // Changes arrive, and with the process dead what was there goes on.
    cluster.kubectl(&["scale", "deployment/web", "--replicas=1"])?;
    eventually(
        &cluster,
        &["get", "endpoints", "web", "-o", "jsonpath={.subsets[*].addresses[*].ip}"],
        |ips| !ips.is_empty() && !ips.contains(' '),
    )?;
    proxy.end()?;
    let answered = clients.answered();
    wait_until("it serves while dead", PATIENCE, || Ok((clients.answered() > answered + 50).then_some(())))
        .with_context(|| format!("{:?}", clients.losses()))?;
    let tally = clients.stop()?;
    assert_eq!(tally.lost, Vec::<String>::new(), "of {}", tally.answered());

    let cleaned = machine.weft_proxy(&cluster, &["--cleanup"])?.output()?;
    assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    assert!(!machine.pins().exists());
    let cgroup = Path::new("/sys/fs/cgroup/unified").join(machine.cgroup().trim_start_matches('/'));
    assert!(!cgroup.exists(), "{} is left", cgroup.display());
    cluster.purge()
}
