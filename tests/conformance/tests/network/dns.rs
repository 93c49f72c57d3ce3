//! Names: those of Services and pods, in the cluster's DNS and in a pod's own files.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::api::Api;
use serde_json::{Value, json};
use weft_tests_conformance::{Site, address_of, server};

use crate::reach::{client, cluster_address};

/// Waits until the C library finds exactly these addresses for a name, in a pod.
pub(crate) async fn resolves_to(site: &Site, pod: &str, name: &str, to: &[IpAddr]) -> anyhow::Result<()> {
    let wanted: BTreeSet<IpAddr> = to.iter().copied().collect();
    site.until(&format!("{name} is {to:?} in {pod}"), async || {
        let said = site.exec(pod, &["weft-probe", "resolve", name]).await?;
        ensure!(said.success, "{}", said.err);
        let found = said.out.lines().map(str::parse).collect::<Result<BTreeSet<IpAddr>, _>>()?;
        ensure!(found == wanted, "it is {found:?}");
        Ok(Some(()))
    })
    .await
}

/// Waits until a query's answer has these lines, whatever blanks are in them.
async fn query(site: &Site, pod: &str, kind: &str, name: &str, lines: &[String]) -> anyhow::Result<()> {
    site.until(&format!("{kind} of {name} is {lines:?}"), async || {
        let said = site.exec(pod, &["nslookup", &format!("-type={kind}"), name]).await?;
        let found: Vec<String> =
            said.out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let missing: Vec<_> = lines.iter().filter(|line| !found.contains(line)).collect();
        ensure!(missing.is_empty(), "{missing:?} is not in {found:?} {}", said.err);
        Ok(Some(()))
    })
    .await
}

/// The names that a resolver asks for when it is asked for a partial one. busybox' nslookup doesn't search, so the test does.
async fn searched(site: &Site, pod: &str, partial: &str) -> anyhow::Result<Vec<String>> {
    let said = site.exec(pod, &["cat", "/etc/resolv.conf"]).await?;
    let words = |key: &str| {
        let line = said.out.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let dots =
        words("options ").iter().find_map(|option| option.strip_prefix("ndots:")?.parse::<usize>().ok());
    ensure!(partial.matches('.').count() < dots.unwrap_or(1), "{partial} is not searched for: {}", said.out);
    Ok(words("search ").iter().map(|domain| format!("{partial}.{domain}")).collect())
}

fn fqdn(site: &Site, name: &str) -> String {
    format!("{name}.{}.svc.cluster.local", site.namespace)
}

/// The name that an address is asked for by.
fn reverse(address: IpAddr) -> anyhow::Result<String> {
    let IpAddr::V4(address) = address else { anyhow::bail!("{address} is not IPv4") };
    let [a, b, c, d] = address.octets();
    Ok(format!("{d}.{c}.{b}.{a}.in-addr.arpa"))
}

/// A server with a name of its own below a headless Service.
fn named(name: &str, hostname: &str, subdomain: &str) -> Value {
    let mut pod = server(name, "named", &["80/tcp"]);
    pod["spec"]["hostname"] = json!(hostname);
    pod["spec"]["subdomain"] = json!(subdomain);
    pod
}

fn headless(app: &str) -> Value {
    json!({"clusterIP": "None", "selector": {"app": app}, "ports": [{"name": "http", "port": 80}]})
}

pub(crate) async fn cluster(site: Site) -> anyhow::Result<()> {
    site.pod(client("client")).await?;
    let service = Api::<Service>::namespaced(site.client.clone(), "default").get("kubernetes").await?;
    let address = cluster_address(&service, 0)?.ip();
    for name in ["kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"] {
        resolves_to(&site, "client", name, &[address]).await?;
    }
    Ok(())
}

pub(crate) async fn hosts_entries(site: Site) -> anyhow::Result<()> {
    let pod = site.pod(named("querier", "dns-querier-1", "dns-test-service")).await?;
    let address = address_of(&pod)?;
    let full = fqdn(&site, "dns-querier-1.dns-test-service");
    let said = site.exec("querier", &["cat", "/etc/hosts"]).await?;
    let line = said.out.lines().find(|line| line.split_whitespace().next() == Some(&address.to_string()));
    let line = line.with_context(|| format!("{address} is not in {}", said.out))?;
    let names: Vec<&str> = line.split_whitespace().skip(1).collect();
    ensure!(names == [full.as_str(), "dns-querier-1"], "{line}");
    ensure!(
        said.out.lines().any(|line| line.starts_with("127.0.0.1") && line.contains("localhost")),
        "{}",
        said.out
    );
    // No Service of that name exists, so only the file can tell.
    resolves_to(&site, "querier", "dns-querier-1", &[address]).await?;
    resolves_to(&site, "querier", &full, &[address]).await
}

pub(crate) async fn services(site: Site) -> anyhow::Result<()> {
    let pods = vec![server("a", "web", &["80/tcp"]), server("b", "web", &["80/tcp"]), client("client")];
    let pods = site.pods(pods).await?;
    let addresses = [address_of(&pods[0])?, address_of(&pods[1])?];
    site.service("headless", headless("web")).await?;
    let spec = json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]});
    let service = site.service("web", spec).await?;
    let address = cluster_address(&service, 0)?.ip();
    let namespace = &site.namespace;
    for (name, to) in [("web", &[address][..]), ("headless", &addresses[..])] {
        for suffix in [String::new(), format!(".{namespace}"), format!(".{namespace}.svc")] {
            resolves_to(&site, "client", &format!("{name}{suffix}"), to).await?;
        }
        resolves_to(&site, "client", &fqdn(&site, name), to).await?;
    }
    let srv = |name: &str| fqdn(&site, &format!("_http._tcp.{name}"));
    let line = format!("{} service = 0 100 80 {}", srv("web"), fqdn(&site, "web"));
    query(&site, "client", "srv", &srv("web"), &[line]).await?;
    let lines: Vec<String> = addresses
        .iter()
        .map(|ip| {
            let label = ip.to_string().replace('.', "-");
            format!("{} service = 0 50 80 {}", srv("headless"), fqdn(&site, &format!("{label}.headless")))
        })
        .collect();
    query(&site, "client", "srv", &srv("headless"), &lines).await?;
    let line = format!("{} name = {}", reverse(address)?, fqdn(&site, "web"));
    query(&site, "client", "ptr", &reverse(address)?, &[line]).await
}

pub(crate) async fn partial_names(site: Site) -> anyhow::Result<()> {
    let pods = site.pods(vec![server("a", "web", &["80/tcp"]), client("client")]).await?;
    let pod = address_of(&pods[0])?;
    site.service("headless", headless("web")).await?;
    let spec = json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]});
    let address = cluster_address(&site.service("web", spec).await?, 0)?.ip();
    let namespace = &site.namespace;
    let label = pod.to_string().replace('.', "-");
    let target = fqdn(&site, &format!("{label}.headless"));
    for (name, to, target) in [("web", address, fqdn(&site, "web")), ("headless", pod, target)] {
        for suffix in [String::new(), format!(".{namespace}"), format!(".{namespace}.svc")] {
            resolves_to(&site, "client", &format!("{name}{suffix}"), &[to]).await?;
            let partial = format!("_http._tcp.{name}{suffix}");
            let full = fqdn(&site, &format!("_http._tcp.{name}"));
            ensure!(
                searched(&site, "client", &partial).await?.contains(&full),
                "{partial} isn't searched as {full}"
            );
            let line = format!("{full} service = 0 100 80 {target}");
            query(&site, "client", "srv", &full, &[line]).await?;
        }
    }
    Ok(())
}

pub(crate) async fn pod_hostname(site: Site) -> anyhow::Result<()> {
    site.service("sub", headless("named")).await?;
    let pods = site.pods(vec![named("named", "dns-querier-2", "sub"), client("client")]).await?;
    let address = address_of(&pods[0])?;
    for pod in ["named", "client"] {
        resolves_to(&site, pod, &fqdn(&site, "dns-querier-2.sub"), &[address]).await?;
    }
    let full = fqdn(&site, "dns-querier-2.sub");
    query(&site, "client", "a", &full, &[format!("Name: {full}"), format!("Address: {address}")]).await?;
    let said = site.exec("named", &["hostname"]).await?;
    ensure!(said.out.trim() == "dns-querier-2", "the pod calls itself {:?}", said.out);
    let line = format!("{} name = {full}", reverse(address)?);
    query(&site, "client", "ptr", &reverse(address)?, &[line]).await?;
    resolves_to(&site, "named", "dns-querier-2", &[address]).await
}

pub(crate) async fn pod_subdomain(site: Site) -> anyhow::Result<()> {
    site.service("sub", headless("named")).await?;
    let pods = site.pods(vec![named("named", "dns-querier-2", "sub"), client("client")]).await?;
    let address = address_of(&pods[0])?;
    for name in ["sub", "dns-querier-2.sub"] {
        let full = fqdn(&site, name);
        query(&site, "client", "a", &full, &[format!("Name: {full}"), format!("Address: {address}")]).await?;
        resolves_to(&site, "named", &full, &[address]).await?;
    }
    Ok(())
}

pub(crate) async fn external_name(site: Site) -> anyhow::Result<()> {
    site.pod(client("client")).await?;
    site.service("alias", json!({"type": "ExternalName", "externalName": "foo.example.com"})).await?;
    let full = fqdn(&site, "alias");
    let line = format!("{full} canonical name = foo.example.com");
    query(&site, "client", "cname", &full, &[line]).await?;
    site.merge::<Service>("alias", json!({"spec": {"externalName": "bar.example.com"}})).await?;
    let line = format!("{full} canonical name = bar.example.com");
    query(&site, "client", "cname", &full, &[line]).await?;
    let spec = json!({"type": "ClusterIP", "externalName": null, "ports": [{"port": 80, "name": "http"}]});
    let service = site.merge::<Service>("alias", json!({"spec": spec})).await?;
    resolves_to(&site, "client", &full, &[cluster_address(&service, 0)?.ip()]).await
}

pub(crate) async fn custom_config(site: Site) -> anyhow::Result<()> {
    let mut pod = client("client");
    pod["spec"]["dnsPolicy"] = json!("None");
    pod["spec"]["dnsConfig"] = json!({
        "nameservers": ["192.0.2.1", "192.0.2.2"],
        "searches": ["resolv.conf.local"],
        "options": [{"name": "ndots", "value": "3"}, {"name": "edns0"}],
    });
    site.pod(pod).await?;
    let said = site.exec("client", &["cat", "/etc/resolv.conf"]).await?;
    let lines: Vec<&str> = said.out.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let wanted =
        ["nameserver 192.0.2.1", "nameserver 192.0.2.2", "search resolv.conf.local", "options ndots:3 edns0"];
    let (lines, wanted): (BTreeSet<_>, BTreeSet<_>) =
        (lines.into_iter().collect(), wanted.into_iter().collect());
    ensure!(lines == wanted, "{}", said.out);
    Ok(())
}
