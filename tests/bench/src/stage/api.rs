//! An API server for service proxies: lists and watches over HTTP, from memory. It costs the same whoever asks.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);
/// A proxy that doesn't read its events for so long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// The longest body of a request that is read.
const MAX_BODY_BYTES: u64 = 1 << 20;

#[derive(Default)]
struct State {
    /// Objects by plural, as JSON.
    lists: BTreeMap<String, Vec<String>>,
    watches: Vec<(String, TcpStream)>,
    /// When a list was last handed over whole.
    listed: BTreeMap<String, Instant>,
    revision: u64,
}

/// The server; its threads end with their connections.
#[derive(Clone, Default)]
pub(crate) struct Api(Arc<Mutex<State>>);

impl Api {
    /// Serves on a listener.
    pub(crate) fn serve(&self, listener: TcpListener) {
        self.state().revision = 1;
        let api = self.clone();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let api = api.clone();
                // A proxy that goes away closes its connections.
                std::thread::spawn(move || api.connection(&stream));
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a list has from now on; watches are not told.
    pub(crate) fn list(&self, plural: &str, objects: &[Value]) {
        let texts = objects.iter().map(Value::to_string).collect();
        self.state().lists.insert(plural.to_owned(), texts);
    }

    /// Replaces an object of a list, without telling watches.
    pub(crate) fn replace(&self, plural: &str, at: usize, object: &Value) {
        if let Some(slot) = self.state().lists.get_mut(plural).and_then(|list| list.get_mut(at)) {
            *slot = object.to_string();
        }
    }

    /// When both lists of a proxy that began after `begin` had been handed over.
    pub(crate) fn listed_since(&self, begin: Instant) -> Option<Instant> {
        let state = self.state();
        let times = ["services", "endpointslices"].map(|plural| state.listed.get(plural).copied());
        let times: Option<Vec<Instant>> = times.into_iter().collect();
        times
            .filter(|times| times.iter().all(|time| *time >= begin))
            .and_then(|times| times.into_iter().max())
    }

    /// A revision that no object had yet.
    pub(crate) fn next_revision(&self) -> u64 {
        let mut state = self.state();
        state.revision += 1;
        state.revision
    }

    /// The watches so far were those of a process that has ended.
    pub(crate) fn forget_watches(&self) {
        self.state().watches.clear();
    }

    /// Waits until somebody watches.
    pub(crate) fn wait_for_watch(&self, plural: &str) -> anyhow::Result<()> {
        wait_until(&format!("{plural} are watched"), PATIENCE, || {
            Ok(self.state().watches.iter().any(|(of, _)| of == plural).then_some(()))
        })
    }

    /// Writes an event to all watches; when it is written.
    pub(crate) fn event(&self, plural: &str, kind: &str, object: &Value) -> anyhow::Result<Instant> {
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        let mut state = self.state();
        let mut told = 0;
        let begin = Instant::now();
        state.watches.retain_mut(|(of, stream)| {
            let is_for = of == plural;
            let alive = !is_for || stream.write_all(chunk.as_bytes()).is_ok();
            told += usize::from(is_for && alive);
            alive
        });
        ensure!(told > 0, "nobody watches {plural}");
        Ok(begin)
    }

    fn connection(&self, stream: &TcpStream) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_PATIENCE))?;
        let mut reader = BufReader::new(stream);
        loop {
            let Some(request) = Request::read(&mut reader)? else { return Ok(()) };
            let writer = stream.try_clone()?;
            if self.answer(&request, writer)? {
                return Ok(());
            }
        }
    }

    /// Answers a request; whether the connection is a watch's from now on.
    fn answer(&self, request: &Request, mut stream: TcpStream) -> anyhow::Result<bool> {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        let plural = words.last().copied().unwrap_or_default();
        if request.method != "GET" {
            respond(&mut stream, "201 Created", request.body.as_bytes())?;
            return Ok(false);
        }
        if let [.., "nodes", name] = words.as_slice() {
            let node = node(name).to_string();
            respond(&mut stream, "200 OK", node.as_bytes())?;
            return Ok(false);
        }
        // A list in the form of a watch is refused, as a server that doesn't have it does; clients then list.
        if query.contains("sendInitialEvents=true") {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422});
            respond(&mut stream, "422 Unprocessable Entity", status.to_string().as_bytes())?;
            return Ok(false);
        }
        if query.contains("watch=true") || query.contains("watch=1") {
            let head =
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
            let mut state = self.state();
            stream.write_all(head.as_bytes())?;
            state.watches.push((plural.to_owned(), stream));
            return Ok(true);
        }
        let (body, is_last) = self.render(plural, query);
        respond(&mut stream, "200 OK", body.as_bytes())?;
        if is_last {
            self.state().listed.insert(plural.to_owned(), Instant::now());
        }
        Ok(false)
    }

    /// A list, or the page of it that is asked for; whether it is the last. As upstream's, a list from the cache comes whole.
    fn render(&self, plural: &str, query: &str) -> (String, bool) {
        let state = self.state();
        let (version, kind) = match plural {
            "services" => ("v1", "ServiceList"),
            "nodes" => ("v1", "NodeList"),
            "endpointslices" => ("discovery.k8s.io/v1", "EndpointSliceList"),
            "servicecidrs" => ("networking.k8s.io/v1", "ServiceCIDRList"),
            _ => ("v1", "List"),
        };
        let parameter = |name: &str| {
            let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            value.and_then(|value| value.parse::<usize>().ok())
        };
        let all = state.lists.get(plural).map_or(&[][..], Vec::as_slice);
        let from = parameter("continue").unwrap_or(0).min(all.len());
        let limit = parameter("limit").filter(|limit| *limit > 0 && parameter("resourceVersion") != Some(0));
        let to = limit.map_or(all.len(), |limit| all.len().min(from + limit));
        let next = if to < all.len() { format!(",\"continue\":\"{to}\"") } else { String::new() };
        let (revision, items) = (state.revision, all[from..to].join(","));
        let body = format!(
            "{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",\"metadata\":{{\"resourceVersion\":\"{revision}\"{next}}},\"items\":[{items}]}}"
        );
        (body, to == all.len())
    }
}

fn respond(stream: &mut TcpStream, status: &str, body: &[u8]) -> anyhow::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body)?)
}

/// The node that the proxy runs on.
pub(crate) fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": "node", "resourceVersion": "1"},
        "spec": {"podCIDR": "10.42.0.0/16", "podCIDRs": ["10.42.0.0/16"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.42.0.1"}, {"type": "Hostname", "address": name}]}})
}

struct Request {
    method: String,
    target: String,
    body: String,
}

impl Request {
    /// `None` at the end of the connection.
    fn read(reader: &mut BufReader<&TcpStream>) -> anyhow::Result<Option<Self>> {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        let mut words = first.split_whitespace();
        let method = words.next().context("a request line")?.to_owned();
        let target = words.next().context("a request line with a target")?.to_owned();
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().context("a length")?;
            }
        }
        let mut body = String::new();
        reader.take(length.min(MAX_BODY_BYTES)).read_to_string(&mut body)?;
        Ok(Some(Self { method, target, body }))
    }
}
