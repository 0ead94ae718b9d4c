package podsandbox

import (
	"context"
	"fmt"
)

// NotePodResources records what the kubelet says that a pod may use as a whole: change is given what was recorded
// before, nil at first, and returns what is to be shown. Nothing is applied: the pod-level cgroup is the
// kubelet's, and it has written it already (KEP-2837).
//
// Errors: ErrNotFound; ErrState when the pod is not ready.
func (m *Manager) NotePodResources(ctx context.Context, id string, change func(before []byte) ([]byte, error)) error {
	p, err := m.findPod(id)
	if err != nil {
		return err
	}
	op, err := m.begin("update pod", p.object())
	if err != nil {
		return err
	}
	defer m.end(op)
	op.at("wait for its turn")
	if err := p.turn.take(ctx); err != nil {
		return op.fail(err)
	}
	defer p.turn.pass()
	if phase := p.phase(); phase != podReady {
		return op.fail(fmt.Errorf("%w: the pod is %s", ErrState, phase))
	}
	now, err := change(p.now.Load().state.Resources)
	if err != nil {
		return op.fail(err)
	}
	m.notePod(ctx, p, func(s *podState) { s.Resources = now })
	return nil
}
