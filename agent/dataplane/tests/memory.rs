//! What a Service costs in memory, as D7 has it: from 1,000 Services to 30,000, of four endpoints each. Bytes that are asked for are counted;
//! the allocator takes some more.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use weft_agent_dataplane::maps::{Entry, MapError, MapSet, Table};
use weft_agent_dataplane::reconcile::Reconciler;
use weft_agent_dataplane::tables::Tables;

/// The most that a Service may cost.
const MOST_BYTES: usize = 1_200;

struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The kernel's maps take no memory of the process.
struct Elsewhere;

impl MapSet for Elsewhere {
    fn update(&mut self, _: Table, _: &[Entry]) -> Result<(), MapError> {
        Ok(())
    }

    fn delete(&mut self, _: Table, _: &[Vec<u8>]) -> Result<(), MapError> {
        Ok(())
    }

    fn dump(&mut self, _: Table) -> Result<Vec<Entry>, MapError> {
        Ok(Vec::new())
    }
}

fn enter(reconciler: &mut Reconciler<Elsewhere>, number: u32) {
    let (name, address) = (format!("s{number:05}"), Ipv4Addr::from(0x0a2b_0001 + number));
    let service = json!({"metadata": {"namespace": "default", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
    let endpoints: Vec<_> = (0..4)
        .map(|endpoint| Ipv4Addr::from(0x0a40_0001 + number * 4 + endpoint))
        .map(|pod| json!({"addresses": [pod], "nodeName": "node-b", "targetRef": {"uid": format!("pod-{pod}")}}))
        .collect();
    let slice = json!({"addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "metadata": {"namespace": "default", "name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}}});
    let changed =
        reconciler.tables.apply_slice(&serde_json::from_str(&slice.to_string()).expect("it is a slice"));
    reconciler.mark(changed);
    let changed = reconciler
        .tables
        .apply_service(&serde_json::from_str(&service.to_string()).expect("it is a Service"));
    reconciler.mark(changed);
}

#[test]
fn a_service_costs_little() {
    let mut reconciler = Reconciler::adopt(Tables::new("node-a", Vec::new()), Elsewhere).unwrap();
    let mut live = Vec::new();
    for numbers in [0..1_000, 1_000..30_000] {
        for page in numbers.collect::<Vec<_>>().chunks(500) {
            page.iter().for_each(|number| enter(&mut reconciler, *number));
            assert_eq!(reconciler.sync().failed, 0);
        }
        live.push(LIVE_BYTES.load(Ordering::Relaxed));
    }
    assert_eq!(reconciler.entries(Table::Backends), 120_000);
    let each = (live[1] - live[0]) / 29_000;
    println!("{each} bytes for each Service");
    assert!(each <= MOST_BYTES, "{each} bytes for each Service");
}
