//! Which container a process is in, from its control groups.
//!
//! The container's id is the last component of a path that holds 64 hex
//! digits, bare or dressed up, in version 1 and 2 of control groups alike:
//!
//! | runtime | path |
//! |---|---|
//! | Docker, cgroupfs driver | `/docker/<64 hex>` |
//! | Docker, systemd driver | `/system.slice/docker-<64 hex>.scope` |
//! | Podman | `/machine.slice/libpod-<64 hex>.scope` |
//! | Kubernetes | `/kubepods/burstable/pod<uid>/<64 hex>`, `…/cri-containerd-<64 hex>.scope` |
//! | ECS | `/ecs/<task>/<64 hex>` |
//!
//! Seen from within another cgroup namespace, paths begin with `/..`.

const ID_LENGTH: usize = 64;

/// The 64 hex digits of the container's id in the text of `/proc/PID/cgroup`.
#[must_use]
pub fn container_id(text: &str) -> Option<&str> {
    // Within a path the innermost container counts: with Docker in Docker,
    // that is the one whose processes these are.
    paths(text).find_map(|path| path.rsplit('/').find_map(id_in))
}

/// The last component of the process's control group, for runtimes that use no
/// such ids: of version 2 where it is mounted, else of systemd's own
/// hierarchy, else of the first.
#[must_use]
pub fn group_name(text: &str) -> Option<&str> {
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::").filter(|path| *path != "/"))
        .or_else(|| {
            text.lines()
                .find_map(|line| line.split_once(":name=systemd:").map(|x| x.1))
        })
        .or_else(|| paths(text).next())?;
    path.rsplit('/')
        .find(|part| !part.is_empty() && *part != "..")
}

fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

fn id_in(component: &str) -> Option<&str> {
    let bare = component.strip_suffix(".scope").unwrap_or(component);
    let id = bare.rsplit(['-', ':']).next()?;
    let hex = id
        .bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (id.len() == ID_LENGTH && hex).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn every_runtime_of_the_table() {
        for path in [
            "0::/docker/ID",
            "0::/../ID",
            "0::/system.slice/docker-ID.scope",
            "0::/machine.slice/libpod-ID.scope",
            "0::/machine.slice/libpod-ID.scope/container",
            "12:cpu,cpuacct:/docker/ID\n1:name=systemd:/docker/ID\n0::/",
            "0::/kubepods/burstable/pod8a1d/ID",
            "0::/kubepods.slice/kubepods-pod8a.slice/cri-containerd-ID.scope",
            "0::/system.slice/containerd.service/kubepods-pod8a.slice:cri-containerd:ID",
            "9:memory:/ecs/task/ID",
        ] {
            assert_eq!(container_id(&path.replace("ID", ID)), Some(ID), "{path}");
        }
    }

    #[test]
    fn the_innermost_container_counts() {
        let outer = "f".repeat(64);
        assert_eq!(
            container_id(&format!("0::/docker/{outer}/docker/{ID}")),
            Some(ID)
        );
    }

    #[test]
    fn a_host_process_is_in_no_container() {
        for text in [
            "0::/",
            "0::/user.slice/user-0.slice/session-1.scope",
            "",
            "nonsense",
            "1:cpu",
        ] {
            assert_eq!(container_id(text), None, "{text}");
        }
        assert_eq!(
            container_id(&format!("0::/docker/{}", &ID[1..])),
            None,
            "63 digits"
        );
        assert_eq!(
            container_id(&format!("0::/docker/{}", ID.to_uppercase())),
            None
        );
    }

    #[test]
    fn groups_of_other_runtimes_have_a_name() {
        assert_eq!(group_name("0::/testbed/foo-1"), Some("foo-1"));
        assert_eq!(
            group_name("3:cpu:/x\n1:name=systemd:/lxc/web/\n0::/"),
            Some("web")
        );
        assert_eq!(group_name("3:cpu:/x"), Some("x"));
        assert_eq!(group_name("0::/"), None);
    }
}
