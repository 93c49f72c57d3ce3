use super::*;

fn pool() -> Pool {
    Pool::new("10.42.1.0/29".parse().unwrap(), ip("10.42.1.1"))
}

fn pool6() -> Pool {
    Pool::new("fd00:42:0:1::/64".parse().unwrap(), ip("fd00:42:0:1::1"))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn owner(name: &str) -> Owner {
    Owner { container: name.to_owned(), ifname: "eth0".to_owned() }
}

fn addresses(acquired: &[Acquired]) -> Vec<IpAddr> {
    acquired.iter().map(|one| one.address).collect()
}

#[test]
fn an_owner_keeps_its_address_until_it_gives_it_back() {
    let state = tempfile::tempdir().unwrap();
    let acquire = |name: &str| {
        let got = Leases::open(state.path()).unwrap().acquire(&[pool()], &owner(name), &[]);
        got.map(|got| got[0].address)
    };
    let a = acquire("a").unwrap();
    assert_eq!(acquire("a").unwrap(), a);
    let others: Vec<IpAddr> = ["b", "c", "d", "e"].map(|name| acquire(name).unwrap()).to_vec();
    assert!(!others.contains(&a));
    assert!(matches!(acquire("f"), Err(Error::Exhausted)));
    Leases::open(state.path()).unwrap().release(&owner("c")).unwrap();
    Leases::open(state.path()).unwrap().release(&owner("c")).unwrap();
    assert_eq!(acquire("f").unwrap(), others[1]);
}

#[test]
fn a_wanted_address_is_given_or_refused() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    let acquire = |name: &str, wanted: &[&str]| {
        let wanted: Vec<IpAddr> = wanted.iter().map(|one| ip(one)).collect();
        leases.acquire(&[pool(), pool6()], &owner(name), &wanted)
    };
    let fresh = |address, fresh| Acquired { address: ip(address), fresh };
    // The other family's follows the one that was asked for.
    let both = |is| [fresh("10.42.1.5", is), fresh("fd00:42:0:1::5", is)];
    assert_eq!(acquire("a", &["10.42.1.5"]).unwrap(), both(true));
    assert_eq!(acquire("a", &["10.42.1.5"]).unwrap(), both(false));
    assert!(matches!(acquire("b", &["10.42.1.5"]), Err(Error::Taken(_))));
    assert!(matches!(acquire("b", &["fd00:42:0:1::5"]), Err(Error::Taken(_))));
    assert!(matches!(acquire("b", &["10.42.1.4", "10.42.1.3"]), Err(Error::Second(_))));
    for stray in ["10.42.1.0", "10.42.1.1", "10.42.1.7", "10.42.1.8", "fd00:42:0:1::", "fd00:42:0:2::5"] {
        assert!(matches!(acquire("b", &[stray]), Err(Error::NotInPool(_))), "{stray}");
    }
    let wanted = ["fd00:42:0:1:9::", "10.42.1.3"];
    assert_eq!(addresses(&acquire("b", &wanted).unwrap()), [ip("10.42.1.3"), ip("fd00:42:0:1:9::")]);
}

#[test]
fn both_families_are_given_or_none() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    let small = Pool::new("fd00:42::/126".parse().unwrap(), ip("fd00:42::1"));
    let pools = [pool(), small];
    let acquire = |name: &str| leases.acquire(&pools, &owner(name), &[]);
    assert_eq!(addresses(&acquire("a").unwrap()), [ip("10.42.1.2"), ip("fd00:42::2")]);
    leases.release(&owner("a")).unwrap();
    // 10.42.1.3 and its like: ::3 is there, ::4 is not, so whatever is free is given.
    assert_eq!(addresses(&acquire("b").unwrap()), [ip("10.42.1.3"), ip("fd00:42::3")]);
    assert_eq!(addresses(&acquire("c").unwrap()), [ip("10.42.1.4"), ip("fd00:42::2")]);
    let before = leases.all().unwrap().len();
    assert!(matches!(acquire("d"), Err(Error::Exhausted)));
    assert_eq!(leases.all().unwrap().len(), before, "the IPv4 address was not given back");
}

/// What a kill between the two leaves, and what a version with one family only has left behind.
#[test]
fn half_of_a_pair_is_completed_and_given_back_whole() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    leases.acquire(&[pool()], &owner("a"), &[]).unwrap();
    let got = leases.acquire(&[pool(), pool6()], &owner("a"), &[]).unwrap();
    assert_eq!(got.iter().map(|one| one.fresh).collect::<Vec<_>>(), [false, true]);
    assert_eq!(addresses(&got), [ip("10.42.1.2"), ip("fd00:42:0:1::2")]);
    leases.release(&owner("a")).unwrap();
    assert_eq!(leases.all().unwrap(), []);
}

#[test]
fn a_reboot_frees_everything() {
    let state = tempfile::tempdir().unwrap();
    let before = Leases::open_for(state.path(), "one");
    for name in ["a", "b", "c", "d", "e"] {
        before.acquire(&[pool(), pool6()], &owner(name), &[]).unwrap();
    }
    let after = Leases::open_for(state.path(), "two");
    assert_eq!(after.all().unwrap(), []);
    after.acquire(&[pool(), pool6()], &owner("f"), &[]).unwrap();
    assert!(!state.path().join("boot-one").exists());
}

#[test]
fn threads_never_get_the_same_address() {
    let state = tempfile::tempdir().unwrap();
    let pools = [Pool::new("10.42.1.0/24".parse().unwrap(), ip("10.42.1.1")), pool6()];
    let mut all: Vec<IpAddr> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                let (state, pools) = (state.path(), &pools);
                scope.spawn(move || {
                    let acquire = |n| {
                        let owner = owner(&format!("{thread}-{n}"));
                        addresses(&Leases::open(state).unwrap().acquire(pools, &owner, &[]).unwrap())
                    };
                    (0..30).flat_map(acquire).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 480);
}

#[test]
fn addresses_that_ports_lead_to_are_noted_and_forgotten() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    assert_eq!((leases.mapped().unwrap(), leases.all().unwrap()), (vec![], vec![]));
    let mapped = |address: &str, name: &str| Mapped {
        address: ip(address),
        device: "we@ft0".to_owned(),
        owner: owner(name),
    };
    let (a, b) = (mapped("10.42.1.2", "a"), mapped("fd00:42::2", "b"));
    let locked = leases.lock().unwrap();
    for one in [&a, &b, &a] {
        leases.note_mapped(one, &locked).unwrap();
    }
    // The address is another's now: its note is the one that counts.
    leases.note_mapped(&mapped("fd00:42::2", "c"), &locked).unwrap();
    let mut found = leases.mapped().unwrap();
    found.sort_by_key(|one| one.address);
    assert_eq!(found, [a.clone(), mapped("fd00:42::2", "c")]);
    drop(locked);
    assert_eq!(leases.all().unwrap(), [], "notes are no leases");
    let locked = leases.lock().unwrap();
    for _ in 0..2 {
        leases.forget_mapped(&a, &locked).unwrap();
    }
    assert_eq!(leases.mapped().unwrap(), [mapped("fd00:42::2", "c")]);
}

fn text(leases: &Leases) -> String {
    fs::read_to_string(leases.folder.join(LOG)).unwrap()
}

/// What a kill leaves of a line: nothing of it counts, and the next one takes its place.
#[test]
fn a_line_without_its_end_is_no_lease() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    leases.acquire(&[pool()], &owner("a"), &[]).unwrap();
    let whole = text(&leases);
    let torn = format!("+10.42.1.3 {}\u{fc}/eth0", "b".repeat(80));
    for length in 1..torn.len() {
        let log = File::options().write(true).open(leases.folder.join(LOG)).unwrap();
        log.set_len(0).unwrap();
        log.write_all_at(&[whole.as_bytes(), &torn.as_bytes()[..length]].concat(), 0).unwrap();
        assert_eq!(leases.all().unwrap().len(), 1, "{length}");
        assert_eq!(addresses(&leases.acquire(&[pool()], &owner("c"), &[]).unwrap()), [ip("10.42.1.3")]);
        assert_eq!(leases.held(&owner("c")).unwrap(), [ip("10.42.1.3")], "{length}");
        leases.release(&owner("c")).unwrap();
        assert_eq!(leases.all().unwrap().len(), 1, "{length}");
    }
}

#[test]
fn the_log_is_as_long_as_what_is_held() {
    let state = tempfile::tempdir().unwrap();
    let leases = Leases::open(state.path()).unwrap();
    let pools = [pool(), pool6()];
    leases.acquire(&pools, &owner("stays"), &[]).unwrap();
    let mut longest = 0;
    let mut given = Vec::new();
    for n in 0..2_000 {
        let name = format!("{n:064}");
        given.push(leases.acquire(&pools, &owner(&name), &[]).unwrap()[0].address);
        leases.release(&owner(&name)).unwrap();
        longest = longest.max(text(&leases).len());
    }
    assert!((DEAD_BYTES..DEAD_BYTES + 400).contains(&longest), "{longest}");
    assert_eq!(leases.held(&owner("stays")).unwrap().len(), 2);
    // One address of five is held; the others take turns, whether the log was written anew or not.
    assert!(
        given.windows(5).all(|five| five.iter().collect::<BTreeSet<_>>().len() == 4 && five[0] == five[4])
    );
}

/// While one process writes the log anew, others wait for the lock of the old one.
#[test]
fn no_lease_is_lost_while_the_log_is_written_anew() {
    let state = tempfile::tempdir().unwrap();
    let pools = [Pool::new("10.42.0.0/20".parse().unwrap(), ip("10.42.0.1"))];
    let kept: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let (state, pools) = (state.path(), &pools);
                scope.spawn(move || {
                    for n in 0..300 {
                        let leases = Leases::open(state).unwrap();
                        let name = owner(&format!("{thread}-{n:060}"));
                        leases.acquire(pools, &name, &[]).unwrap();
                        if n % 10 > 0 {
                            leases.release(&name).unwrap();
                        }
                    }
                    30
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let all = Leases::open(state.path()).unwrap().all().unwrap();
    assert_eq!(all.len(), kept);
    assert_eq!(all.iter().map(|lease| lease.address).collect::<BTreeSet<_>>().len(), kept);
}
