"""Looks into what the chart renders to."""


def of_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


def template(owner):
    """What an owner of pods makes them from."""
    if owner["kind"] == "LeaderWorkerSet":
        return owner["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    return owner["spec"]["template"]


def owners(objects):
    return of_kind(objects, "StatefulSet") + of_kind(objects, "LeaderWorkerSet")


def pods(objects):
    """Name and pod spec of everything that starts pods that stay."""
    return [(each["metadata"]["name"], template(each)["spec"]) for each in owners(objects)]


def all_pods(objects):
    """The pod of `helm test` too."""
    return pods(objects) + [(each["metadata"]["name"], each["spec"]) for each in of_kind(objects, "Pod")]


def worker_sets(objects):
    return [each for each in owners(objects) if "espalier/pool" in each["metadata"]["labels"]]


def the_container(pod):
    assert len(pod["containers"]) == 1
    return pod["containers"][0]


def option(container, name):
    """Every value given for a command-line option."""
    arguments = container["args"]
    return [arguments[index + 1] for index, argument in enumerate(arguments) if argument == name]
