//! Who a process runs as: the image's and the pod's wishes resolved against the container's own `/etc/passwd` and `/etc/group`.

use std::fs;
use std::path::Path;

use weft_agent_runtime_init::wire::User;

/// Files in an image may be huge by mistake or malice.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A user as the kernel knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Resolves a user within the root of the calling process.
pub(crate) fn resolve(user: &User) -> Result<Identity, String> {
    resolve_in(user, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &str) -> String {
    let small = fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE_BYTES);
    // An image without the file has no names; numbers work all the same.
    if small {
        fs::read(Path::new(path)).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    } else {
        String::new()
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    })
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        Some((name, fields.next()?.parse().ok()?, fields.next().unwrap_or("")))
    })
}

fn resolve_in(user: &User, passwd: &str, group: &str) -> Result<Identity, String> {
    let (image_user, image_group) = user.image.split_once(':').unwrap_or((&user.image, ""));
    let account = |uid: u32| accounts(passwd).find(|account| account.uid == uid);
    let (uid, account) = match (user.uid, image_user) {
        (Some(uid), _) => (uid, account(uid)),
        (None, "") => (0, account(0)),
        (None, name) => match (accounts(passwd).find(|account| account.name == name), name.parse()) {
            (Some(found), _) => (found.uid, Some(found)),
            (None, Ok(uid)) => (uid, account(uid)),
            (None, Err(_)) => {
                return Err(format!("unable to find user {name}: no matching entries in passwd file"));
            }
        },
    };
    // The image's group goes with the image's user only.
    let image_group = if user.uid.is_some() { "" } else { image_group };
    let gid = match (user.gid, image_group) {
        (Some(gid), _) => gid,
        (None, "") => account.as_ref().map_or(0, |account| account.gid),
        (None, name) => match (groups(group).find(|(found, ..)| *found == name), name.parse()) {
            (Some((_, gid, _)), _) => gid,
            (None, Ok(gid)) => gid,
            (None, Err(_)) => {
                return Err(format!("unable to find group {name}: no matching entries in group file"));
            }
        },
    };
    if user.non_root && uid == 0 {
        return Err("container has runAsNonRoot and image will run as root".to_owned());
    }
    let mut all = vec![gid];
    if let Some(account) = &account {
        let member = |members: &str| members.split(',').any(|member| member == account.name);
        all.extend(groups(group).filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid));
    }
    all.extend(&user.supplemental);
    let mut unique = Vec::new();
    all.into_iter().for_each(|gid| {
        if !unique.contains(&gid) {
            unique.push(gid)
        }
    });
    let home = account.map(|account| account.home).filter(|home| !home.is_empty()).unwrap_or("/");
    Ok(Identity { uid, gid, groups: unique, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlogs:x:50:www,other\n";

    fn user(image: &str) -> User {
        User { image: image.to_owned(), ..User::default() }
    }

    #[test]
    fn names_and_numbers_resolve() {
        let www = resolve_in(&user("www"), PASSWD, GROUP).unwrap();
        assert_eq!(www, Identity { uid: 33, gid: 34, groups: vec![34, 50], home: "/var/www".to_owned() });
        assert_eq!(resolve_in(&user("33"), PASSWD, GROUP).unwrap(), www);
        let odd = resolve_in(&user("1000:logs"), PASSWD, GROUP).unwrap();
        assert_eq!((odd.uid, odd.gid, odd.home.as_str()), (1000, 50, "/"));
        assert!(resolve_in(&user("nobody"), PASSWD, GROUP).is_err());
        assert_eq!(resolve_in(&user(""), "", "").unwrap().uid, 0);
    }

    #[test]
    fn the_pod_goes_before_the_image() {
        let pod = User { uid: Some(7), supplemental: vec![9, 0], ..user("www:logs") };
        let found = resolve_in(&pod, PASSWD, GROUP).unwrap();
        assert_eq!((found.uid, found.gid, found.groups), (7, 0, vec![0, 9]));
        assert!(resolve_in(&User { non_root: true, ..user("root") }, PASSWD, GROUP).is_err());
    }
}
